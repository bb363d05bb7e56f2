"""How the C library handles the memory of activations."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
_KEEP_BYTES = 1 << 30
_PAD_BYTES = 64 << 20


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free, up to 1 GiB, instead of giving it back to the system.

    Activations of some megabytes come and go thousands of times a second; by default glibc maps each anew, and the
    kernel fills its pages with zeros. `benchmarks/training.py` shows what that costs. Nothing happens on other C
    libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
    mallopt(_M_TOP_PAD, _PAD_BYTES)

"""The processor's instruction set, coarsely: what an optimised CPU model depends on."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def instruction_set() -> str:
    """Return for instance "x86_64-avx512-vnni", "x86_64-avx2" or "aarch64".

    ONNX Runtime chooses the channel block of its NCHWc kernels by the first: 16 with AVX-512, 8 without. Whether there
    is VNNI decides which form the weights of integer engines take.
    """
    machine = platform.machine().lower()
    flags = _cpu_flags()
    for flag, name in (("avx512f", "avx512"), ("avx2", "avx2"), ("avx", "avx")):
        if flag in flags:
            return f"{machine}-{name}" + ("-vnni" if has_vnni() else "")
    return machine


def has_vnni() -> bool:
    """Say whether the processor multiplies 8-bit integers without 16-bit sums that saturate (ARM's never do)."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return not is_x86 or bool(_cpu_flags() & {"avx512_vnni", "avx_vnni"})


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: the architecture alone has to do
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()

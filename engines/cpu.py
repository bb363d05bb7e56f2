"""The processor's instruction set, coarsely: what an optimised CPU model depends on."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def instruction_set() -> str:
    """Return for instance "x86_64-avx512", "x86_64-avx2" or "aarch64".

    ONNX Runtime chooses the channel block of its NCHWc kernels by this: 16 with AVX-512, 8 without.
    """
    machine = platform.machine().lower()
    flags = _cpu_flags()
    for flag, name in (("avx512f", "avx512"), ("avx2", "avx2"), ("avx", "avx")):
        if flag in flags:
            return f"{machine}-{name}"
    return machine


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: the architecture alone has to do
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()

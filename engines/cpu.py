"""The processor: its name, and its instruction set, coarsely, on which an optimised CPU model depends."""

from __future__ import annotations

import platform
from collections.abc import Mapping
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
    return instruction_flags(cpu_fields())


def cpu_fields(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return what the system says of its first processor; nothing where it has no such file."""
    try:
        first_processor = cpuinfo.read_text(errors="replace").strip().split("\n\n")[0]
    except OSError:  # not Linux
        return {}
    pairs = (line.partition(":") for line in first_processor.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model(fields: Mapping[str, str]) -> str:
    """Return the processor's name; `fields` are of `cpu_fields`."""
    return fields.get("model name") or platform.processor() or platform.machine()


def instruction_flags(fields: Mapping[str, str]) -> frozenset[str]:
    """Return what the processor can do; empty where that is not listed. `fields` are of `cpu_fields`."""
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())

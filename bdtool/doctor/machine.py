"""The interpreter, the operating system and the processor."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from bdtool.doctor.finding import Finding
from engines.cpu import cpu_fields, cpu_model, instruction_flags
from export.processors import n_processors


def python() -> Finding:
    detail = f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    return Finding("Python", "ok", detail)


def operating_system() -> Finding:
    detail = platform.platform()
    if os.name != "posix":
        return Finding("operating system", "problem", f"{detail}: bdtool needs POSIX file locks", "use Linux or WSL 2")
    return Finding("operating system", "ok", detail)


# The instruction sets that decide how fast fp32 and int8 convolutions run on a CPU.
_INSTRUCTION_SETS = (
    *("sse4_2", "avx", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    fields = cpu_fields(cpuinfo)
    flags = instruction_flags(fields)
    known = " ".join(name for name in _INSTRUCTION_SETS if name in flags) or "instruction sets not listed"
    cores = f"{n_processors():g} of {os.cpu_count()} cores available"
    return Finding("processor", "ok", f"{cpu_model(fields)}; {cores}; {known}")

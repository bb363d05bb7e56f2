"""The interpreter, the operating system and the processor."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from bdtool.doctor.finding import Finding
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
    fields = _cpuinfo_fields(cpuinfo)
    model = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    known = [name for name in _INSTRUCTION_SETS if name in flags]
    cores = f"{n_processors():g} of {os.cpu_count()} cores available"
    return Finding("processor", "ok", f"{model}; {cores}; {' '.join(known) or 'instruction sets not listed'}")


def _cpuinfo_fields(cpuinfo: Path) -> dict[str, str]:
    """Return the fields of the first processor; none where the system has no such file."""
    if not cpuinfo.is_file():
        return {}
    first_processor = cpuinfo.read_text(errors="replace").strip().split("\n\n")[0]
    pairs = (line.partition(":") for line in first_processor.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}

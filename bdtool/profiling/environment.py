"""The machine and the versions that a figure was measured with."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from bdtool.version import version
from engines.cpu import instruction_set


def describe_environment(
    *, backend: str, backend_version: str, device: str, threads: int
) -> dict[str, str | int | float]:
    """Return what a reader needs to judge or repeat a measurement."""
    return {
        "cpu": cpu_model(),
        "instruction_set": instruction_set(),
        "processors_available": len(os.sched_getaffinity(0)),
        "cpu_affinity": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "threads": threads,
        "device": device,
        "backend": f"{backend} {backend_version}",
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "bdtool": version(),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

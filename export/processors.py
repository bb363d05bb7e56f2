"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def n_processors(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Return the processors of its affinity, or less where a container has a quota (`docker --cpus`; cgroup v2)."""
    n_processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        return min(n_processors, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return n_processors

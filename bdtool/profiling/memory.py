"""The largest resident size of this process, as Linux keeps it."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_FIELD = "VmHWM:"  # not getrusage's ru_maxrss, which survives exec: a process that a larger one started has its size


def peak_memory_mib() -> float | None:
    """Return the largest resident size so far, in MiB; None where the kernel does not say."""
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(_FIELD):
            return int(line.split()[1]) / 1024  # KiB, which the file calls kB
    return None

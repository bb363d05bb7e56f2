"""`Finding`: what one probe saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one probe saw. `remedy` is a command or one sentence; None where nothing needs doing."""

    name: str
    status: Status
    detail: str
    remedy: str | None = None


def first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__

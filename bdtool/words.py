"""Figures and lists of names as text, the same on charts, in captions, tables and errors."""

from __future__ import annotations

from collections.abc import Sequence

_MAX_LISTED = 8


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def milliseconds(value: float) -> str:
    return f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms"


def flops(value: float) -> str:
    """Return FLOPs with the unit that leaves at least one digit before the point."""
    if value >= 1e9:
        return f"{value / 1e9:.2f} GFLOPs"
    return f"{value / 1e6:.1f} MFLOPs" if value >= 1e6 or value == 0 else f"{value / 1e3:.1f} kFLOPs"


def counted(number: int, noun: str) -> str:
    """Return "1 image" or "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listing(names: Sequence[str]) -> str:
    """Return the names joined by commas: the first few, and how many more there are."""
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def blocks(value: float) -> str:
    if value == 1:
        return "1 block"
    return f"{value:.0f} blocks" if value == round(value) else f"{value:.2f} blocks"

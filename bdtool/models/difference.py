"""What a file's tensors lack, have too much, or have in the wrong shape. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bdtool.words import listing

COUNTER = "num_batches_tracked"  # BatchNorm's step counter: only momentum=None reads it, and files before 2018 lack it


@dataclass(frozen=True, kw_only=True)
class StateDifference:
    """How the tensors of a file differ from those a model needs; false when they fit."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]  # "name got [..], needs [..]"

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        named = {"missing": self.missing, "unexpected": self.unexpected, "mis-shaped": self.misshaped}
        return "; ".join(f"{len(names)} {what}: {listing(names)}" for what, names in named.items() if names)


def compare_states(got: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]]) -> StateDifference:
    """Compare tensor shapes by name; BatchNorm's step counters may be absent."""
    return StateDifference(
        missing=tuple(name for name in needed if name not in got and not name.endswith(COUNTER)),
        unexpected=tuple(name for name in got if name not in needed),
        misshaped=tuple(
            f"{name} got {list(got[name])}, needs {list(needed[name])}"
            for name in needed
            if name in got and list(got[name]) != list(needed[name])
        ),
    )

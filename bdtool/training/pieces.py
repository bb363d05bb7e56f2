"""A run in pieces of any kind: saved, interrupted and taken up between two of them, as `Trainer` is between steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from bdtool.training.place import TrainingPlace
from bdtool.training.progress_file import read_progress, write_progress
from bdtool.training.stopping import Interrupted, StopNow, stop_signals


class Part(Protocol):
    """Work that goes on in pieces of seconds at most, the same whether it was taken up in between or not.

    Attributes:
        name: what it is, for people.
        share: how much of it is done, 0 to 1.
        where: how far it is, for people: "step 5 of 12".
    """

    @property
    def name(self) -> str: ...
    @property
    def is_over(self) -> bool: ...
    @property
    def share(self) -> float: ...
    @property
    def where(self) -> str: ...

    def advance(self) -> None:
        """Do the next piece; there is one until `is_over`."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that was found so far, as tensors, numbers and texts."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


def run_pieces(
    part: Part, place: TrainingPlace, *, request: Mapping[str, Any], measure: Callable[[], Mapping[str, float]]
) -> Mapping[str, float]:
    """Run `part` from its first piece, or from the checkpoint of `place`, to its last; return what `measure` gives.

    The checkpoint is written every `place.save_every_s` and before the measurement; it stays for the caller to remove.

    Args:
        request: everything that was asked for, as JSON values; a checkpoint of another request is refused.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the piece in hand was finished and saved, a measurement broken off.
    """
    if place.checkpoint.exists():
        part.load_state_dict(read_progress(place.checkpoint, request=request))
        place.on_resume(part.where)
    saved = time.monotonic()
    place.on_progress(part.share, part.name)
    with stop_signals() as stop:
        while not part.is_over:
            part.advance()
            place.on_progress(part.share, part.name)
            if part.is_over or stop.requested or time.monotonic() - saved > place.save_every_s:
                write_progress(place.checkpoint, {"request": dict(request), **part.state_dict()})
                saved = time.monotonic()
            if stop.requested:
                raise _interrupted(part)
        try:
            with stop.at_once():
                return measure()
        except StopNow:
            raise _interrupted(part) from None


def _interrupted(part: Part) -> Interrupted:
    return Interrupted(f"stopped after {part.where}; the same command with --resume goes on")

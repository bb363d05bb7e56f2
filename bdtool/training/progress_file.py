"""The checkpoint of an unfinished run: written whole, read without running code, refused where it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bdtool.errors import TrainingError
from export.files import atomic_path

FORMAT_VERSION = 1
_NOT_ASKED = {"downscale": 1}  # what a request of an older bdtool has no word of


def write_progress(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers and texts to `path`, atomically.

    Raises:
        TrainingError: it cannot be written; an earlier one is whole.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
    except (OSError, RuntimeError) as exc:
        after = "the one before is whole. Make room, then go on with --resume"
        if not path.exists():
            after = "there is none before it. Make room, then start again"
        raise TrainingError(f"{path}: the checkpoint cannot be written ({_reason(exc)}); {after}") from exc


def _reason(error: OSError | RuntimeError) -> str:
    """Say why a file cannot be written: PyTorch speaks of positions in it, while it handles what the system said."""
    cause = error if isinstance(error, OSError) else error.__context__
    return cause.strerror or str(cause) if isinstance(cause, OSError) else str(error).strip().splitlines()[0]


def read_progress(path: Path, *, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a run that was asked for as `request` says.

    Raises:
        TrainingError: the file is damaged or newer, or its run was asked for otherwise.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version, previous = state["format_version"], dict(state["request"])
    except Exception as exc:  # a damaged pickle fails with whatever its broken bytes happen to ask for
        raise TrainingError(f"{path}: not a whole checkpoint of a run ({exc}); remove it to start anew") from exc
    if version > FORMAT_VERSION:
        raise TrainingError(
            f"{path} has format_version {version}, this bdtool reads up to {FORMAT_VERSION}; upgrade bdtool"
        )
    before, now = {**_NOT_ASKED, **_flat(previous)}, {**_NOT_ASKED, **_flat(request)}
    if differing := [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]:
        raise TrainingError(
            f"{path} belongs to a run that was asked for otherwise ({'; '.join(differing)}); "
            "use the same options, or remove it to start anew"
        )
    return state


def diverged(problem: str, checkpoint: Path | None) -> TrainingError:
    """Return the error of a run whose numbers are lost. Going on from its checkpoint would lead there again."""
    left = f"; remove {checkpoint} first, as --resume leads there again" if checkpoint and checkpoint.exists() else ""
    return TrainingError(f"{problem}; try a lower learning rate, or --amp off{left}")


def _flat(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run was asked for with its options one by one, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for name, value in request.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return flat

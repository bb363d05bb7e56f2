"""Which strategy was measured to be the fastest here: recorded beside the engines that it was measured with.

The directory of the engines names backend, version, target and precision; within it there is one entry for each number
of threads and batch size, because the order of the strategies changes with both.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bdtool.errors import BundleError
from bdtool.runtime.factory import STRATEGIES
from bdtool.words import counted
from export.files import json_from_bytes, write_json

AUTO = "auto"
CANDIDATES = tuple(name for name in STRATEGIES if name != "full")  # `full` takes no policy, so it is no answer
FILE = "recommendation.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The strategy with the lowest ratio to `full`, and the measurement that says so."""

    strategy: str
    threads: int
    batch: int
    policy: str
    medians_ms: Mapping[str, float]  # of a request, all strategies of the run, `full` included
    input_source: str
    versions: Mapping[str, str]
    ratios_to_full: Mapping[str, float] = field(default_factory=dict)  # empty in records that went by the medians

    def __post_init__(self) -> None:
        if self.strategy not in CANDIDATES:
            raise ValueError(f"strategy {self.strategy!r} is not one of {', '.join(CANDIDATES)}")
        for name, value in (("threads", self.threads), ("batch", self.batch)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1; got {value!r}")
        for name, values in (("medians_ms", self.medians_ms), ("ratios_to_full", self.ratios_to_full)):
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in values.values()):
                raise ValueError(f"{name} must be finite numbers")


def choose_strategy(ratios_to_full: Mapping[str, float]) -> str:
    """Return the candidate with the lowest ratio; of equal ones the first measured."""
    return min((name for name in ratios_to_full if name in CANDIDATES), key=lambda name: ratios_to_full[name])


def is_recommended(directory: Path, *, threads: int, batch: int) -> bool:
    """Say whether something was recorded for these threads and this batch; nothing in a damaged file was."""
    try:
        return any(_place(entry) == (threads, batch) for entry in read_recommendations(directory))
    except BundleError:
        return False


def write_recommendation(directory: Path, recommendation: Recommendation) -> None:
    """Record a recommendation in the engines' directory, in the place of an earlier one for these threads and batch.

    The file is replaced atomically; a damaged one is replaced as a whole.
    """
    try:
        entries = [entry for entry in read_recommendations(directory) if _place(entry) != _place(recommendation)]
    except BundleError:
        entries = []
    entries = sorted([*entries, recommendation], key=_place)
    rows = [asdict(entry) for entry in entries]
    directory.mkdir(parents=True, exist_ok=True)  # the engines may lie in that of several targets
    write_json(directory / FILE, {"format_version": _FORMAT_VERSION, "recommendations": rows})


def read_recommendation(directory: Path, *, threads: int, bundle: Path) -> Recommendation:
    """Return what was recorded for that number of threads: for batch 1, else for the smallest batch there is.

    One strategy serves all the batches that come; what comes is not known when a bundle is opened, and the default of
    `profile` is single images.

    Raises:
        BundleError: nothing was recorded for it, or the file is damaged.
    """
    place = shlex.quote(str(bundle))
    remedy = f"Run `bdtool profile {place} --strategy auto --threads {threads}` (with the --data it will see)"
    try:
        entries = read_recommendations(directory)
    except BundleError as exc:
        raise BundleError(f"{exc}. {remedy}") from exc
    if not entries:
        raise BundleError(f"{bundle}: strategy 'auto' has no recommendation for {directory.name}. {remedy}")
    fitting = [entry for entry in entries if entry.threads == threads]
    if fitting:
        return min(fitting, key=lambda entry: entry.batch)
    known = ", ".join(map(str, sorted({entry.threads for entry in entries})))
    raise BundleError(
        f"{bundle}: strategy 'auto' has no recommendation for {counted(threads, 'thread')}, only for {known}. {remedy}"
    )


def read_recommendations(directory: Path) -> list[Recommendation]:
    """Return all that was recorded in an engines' directory; none where there is no file.

    Raises:
        BundleError: the file is damaged.
    """
    try:
        return _read(directory)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BundleError(f"{directory / FILE} cannot be read as a recommendation ({exc})") from exc


def _place(entry: Recommendation) -> tuple[int, int]:
    """Return what there is one entry for."""
    return entry.threads, entry.batch


def _read(directory: Path) -> list[Recommendation]:
    data: Any = json_from_bytes((directory / FILE).read_bytes())
    if data["format_version"] != _FORMAT_VERSION:
        raise ValueError(f"format_version is {data['format_version']!r}, this version reads {_FORMAT_VERSION}")
    return [Recommendation(**row) for row in data["recommendations"]]

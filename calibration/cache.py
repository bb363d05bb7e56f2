"""Calibration that was interrupted goes on where it stopped, and one that was done before is not done again.

A file holds the histograms after so many images, under a name that is the digest of everything they depend on.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.paths import PathBatch, PathWalker
from calibration.ranges import RangeCollector
from export.files import json_from_bytes, write_bytes, write_json

SAVE_EVERY = 4  # batches; an interruption loses no more


def content_key(**parts: object) -> str:
    """Return a digest of named values, as a file name; whatever a result depends on belongs into it."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def collect_ranges(
    walker: PathWalker,
    batches: Iterable[PathBatch],
    file: Path,
    *,
    on_batch: Callable[[int], None] = lambda n_images: None,
) -> RangeCollector:
    """Run the batches along their paths, saving to `file` on the way; batches that it holds already are not run.

    Args:
        file: named by the `content_key` of images, policy, parts and options; damaged content is ignored.
    """
    collector, done = _load(file)
    waiting = 0
    for batch in batches:
        if batch.first >= done:
            walker.add(batch, collector)
            done, waiting = batch.first + len(batch.images), waiting + 1
            if waiting == SAVE_EVERY:
                _save(file, collector, done)
                waiting = 0
        on_batch(len(batch.images))
    if waiting:
        _save(file, collector, done)
    return collector


class ResultCache:
    """Figures by name in a JSON file, written as each becomes known; a file that was changed since is ignored."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows = _rows_in(file)

    def get(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the row of that name, computed and stored where it was not known."""
        if name not in self._rows:
            self._rows[name] = dict(compute())
            write_json(self._file, {"sha256": _digest(self._rows), "rows": self._rows})
        return dict(self._rows[name])


def _rows_in(file: Path) -> dict[str, Any]:
    try:
        content = json_from_bytes(file.read_bytes())
    except (OSError, ValueError):
        return {}
    match content:
        case {"sha256": digest, "rows": dict(rows)} if digest == _digest(rows):
            return rows
    return {}


def _digest(rows: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _load(file: Path) -> tuple[RangeCollector, int]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            rows = {name: arrays[name] for name in arrays.files}
        return RangeCollector.from_arrays(rows), int(rows.pop("n_images"))
    except Exception:  # on damaged files numpy and zipfile raise almost anything: zlib.error, TokenError
        return RangeCollector(), 0


def _save(file: Path, collector: RangeCollector, n_images: int) -> None:
    memory = io.BytesIO()
    np.savez_compressed(memory, n_images=np.array(n_images), **collector.arrays())  # type: ignore[arg-type]
    write_bytes(file, memory.getvalue())

"""TensorRT's timing cache as one file for all parts and processes: which kernels won, so that they race only once.

It holds for one GPU model, CUDA and TensorRT version. Builds that run side by side each start from what is in the file
and add what they learned under a lock, so none loses the other's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines.gpu_cache import locked
from export.files import write_bytes

logger = logging.getLogger(__name__)


class TimingCache:
    """The cache in the file `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def applied(self, config: Any) -> Iterator[None]:
        """Give `config` what the file holds; after a build, add to the file what the build learned.

        Whatever is wrong with the cache is logged, and costs only time.
        """
        if not self._give(config, self._read()):
            logger.warning(
                "the timing cache %s is not one for this GPU and version, or is damaged; it is made anew", self.path
            )
            self._give(config, b"")
        yield
        try:
            self._add(config, config.get_timing_cache())
        except Exception as exc:  # the engine is built; bindings raise what they like
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
            logger.warning("the timing cache %s cannot be written (%s)", self.path, reason)

    def _give(self, config: Any, content: bytes) -> bool:
        try:
            return bool(config.set_timing_cache(config.create_timing_cache(content), False))
        except (RuntimeError, TypeError):  # no cache was made of it
            return False

    def _add(self, config: Any, learned: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            merged = config.create_timing_cache(self._read())  # another build may have written meanwhile
            if merged is None or not merged.combine(learned, False):
                merged = learned  # the file is none that fits
            write_bytes(self.path, bytes(merged.serialize()))

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:  # none yet, or not readable: the kernels race again
            return b""

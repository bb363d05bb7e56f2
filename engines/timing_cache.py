"""TensorRT's timing cache as one file for all parts and processes: which kernels won, so that they race only once.

It holds for one GPU model, CUDA and TensorRT version. Builds that run side by side each start from what is in the file
and add what they learned under a lock, so none loses the other's.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export.files import write_bytes

logger = logging.getLogger(__name__)


class TimingCache:
    """The cache in the file `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def applied(self, config: Any) -> Iterator[None]:
        """Give `config` what the file holds; after a build, add to the file what the build learned."""
        config.set_timing_cache(config.create_timing_cache(self._read()), False)
        yield
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                merged = config.create_timing_cache(self._read())  # another build may have written meanwhile
                merged.combine(config.get_timing_cache(), False)
                write_bytes(self.path, bytes(merged.serialize()))
        except OSError as exc:  # the engine is built all the same, only the next build is slower
            logger.warning("the timing cache %s cannot be written (%s)", self.path, exc.strerror or exc)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:  # none yet, or not readable: the kernels race again
            return b""

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self.path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # waits: a merge takes milliseconds
            yield

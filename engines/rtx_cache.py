"""TensorRT-RTX's runtime cache as a file: kernels that it compiled for this GPU, so that it compiles them only once.

An engine of TensorRT-RTX holds programs, which become machine code when an execution context is made of it.
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

from export.files import sha256_of_bytes, write_bytes

logger = logging.getLogger(__name__)


_N_DIGEST = 64  # characters of the SHA-256 that the file begins with: the library takes a damaged cache as it is


class RuntimeCache:
    """The cache in the file `path`, which need not exist yet. The library checks GPU, driver and version itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: Any = None
        self._written = b""

    def apply(self, config: Any) -> None:
        """Give an engine's runtime config the cache, which is the same for all engines."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read()
        if not config.set_runtime_cache(self._cache):
            logger.info("TensorRT-RTX does not take the runtime cache; it compiles its kernels again")

    def keep_for(self, context: Any) -> None:
        """Keep the library's cache for as long as a context lives that was made with it.

        The bindings do not, and what Python drops together, as a closed bundle, it drops in no certain order.
        """
        weakref.finalize(context, _let_go, self._cache).atexit = False

    def save(self) -> None:
        """Write what was compiled since; a cache that cannot be written costs only time.

        A context of the GPU has to be current: TensorRT-RTX asks it which GPU this is, and gives nothing without one.
        """
        if self._cache is None:
            return
        content = self._cache.serialize()
        if content is None:
            logger.warning("TensorRT-RTX gives no runtime cache for %s: it compiles its kernels again", self.path)
            return
        data = bytes(content)
        if data == self._written:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.path, sha256_of_bytes(data).encode() + data)
            self._written = data
        except OSError as exc:
            logger.warning("the runtime cache %s cannot be written (%s)", self.path, exc.strerror or exc)

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except OSError:  # none yet, or not readable
            return
        digest, data = content[:_N_DIGEST], content[_N_DIGEST:]
        if sha256_of_bytes(data).encode() == digest and self._cache.deserialize(data):
            self._written = data
        else:
            logger.info("%s is damaged, or of another GPU, driver or version; kernels are compiled again", self.path)


def _let_go(cache: Any) -> None:
    """Do nothing: what a finalizer is to be called with lives until then."""

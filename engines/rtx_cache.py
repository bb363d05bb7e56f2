"""TensorRT-RTX's runtime cache as a file: kernels that it compiled for this GPU, so that it compiles them only once.

An engine of TensorRT-RTX holds programs, which become machine code when an execution context is made of it. All
runtimes of a process, and other processes, share the file: each adds to it what it compiled.
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

from engines.cuda_device import nothing_collected
from engines.gpu_cache import locked
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
        """Add to the file what was compiled since; a cache that cannot be written costs only time.

        A context of the GPU has to be current: TensorRT-RTX asks it which GPU this is, and gives nothing without one.
        """
        if self._cache is None or self._content() == self._written:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a runtime that is collected in here would save, too, and wait for the lock that its thread holds
            with nothing_collected(), locked(self.path):
                self._read()  # another runtime may have written meanwhile
                data = self._content()
                write_bytes(self.path, sha256_of_bytes(data).encode() + data)
                self._written = data
        except OSError as exc:
            logger.warning("the runtime cache %s cannot be written (%s)", self.path, exc.strerror or exc)

    def _content(self) -> bytes:
        """Return all that the library has compiled; what is in the file already where it does not say."""
        content = self._cache.serialize()
        if content is None:
            logger.warning("TensorRT-RTX gives no runtime cache for %s: it compiles its kernels again", self.path)
            return self._written
        return bytes(content)

    def _read(self) -> None:
        """Add what is in the file to what the library has compiled."""
        try:
            content = self.path.read_bytes()
        except OSError:  # none yet, or not readable
            return
        digest, data = content[:_N_DIGEST], content[_N_DIGEST:]
        if data and data == self._written:
            return
        if sha256_of_bytes(data).encode() == digest and self._cache.deserialize(data):
            self._written = data
        else:
            logger.info("%s is damaged, or of another GPU, driver or version; kernels are compiled again", self.path)


def _let_go(cache: Any) -> None:
    """Do nothing: what a finalizer is to be called with lives until then."""

"""Where what was learned on a GPU is kept between processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal


def gpu_cache_path(kind: Literal["timing", "runtime"], *, gpu: str, cuda_version: str, library: str) -> Path:
    """Return the file of a cache that holds for one GPU model, CUDA version and library ("tensorrt10.14.1")."""
    return _base() / kind / f"{_key(gpu, cuda_version, library)}.cache"


def gpu_cache_directory(kind: Literal["engines"], *, gpu: str, cuda_version: str, library: str) -> Path:
    """Return the directory of a cache that is many files, for one GPU model, CUDA version and library."""
    return _base() / kind / _key(gpu, cuda_version, library)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a cache that is one file; whoever else holds it is waited for: a merge takes milliseconds."""
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def mark_used(directory: Path, prefix: str) -> None:
    """Note that the files of a cache whose names begin with `prefix` are in use; see `prune`."""
    for path in directory.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            os.utime(path)


def prune(directory: Path, *, max_bytes: int) -> None:
    """Delete files of a cache, those whose last use is the longest ago first, until the rest fits.

    What is deleted is made again when it is needed; what cannot be deleted stays.
    """
    found = []
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and not path.is_symlink():
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max_bytes:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size


def _base() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdtool"


def _key(gpu: str, cuda_version: str, library: str) -> str:
    return re.sub(r"[^\w.]+", "-", f"{gpu}-cuda{cuda_version}-{library}")

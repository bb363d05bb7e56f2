"""Where what was learned on a GPU is kept between processes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal


def gpu_cache_path(kind: Literal["timing", "runtime"], *, gpu: str, cuda_version: str, library: str) -> Path:
    """Return the file of a cache that holds for one GPU model, CUDA version and library ("tensorrt10.14.1")."""
    return _base() / kind / f"{_key(gpu, cuda_version, library)}.cache"


def gpu_cache_directory(kind: Literal["engines"], *, gpu: str, cuda_version: str, library: str) -> Path:
    """Return the directory of a cache that is many files, for one GPU model, CUDA version and library."""
    return _base() / kind / _key(gpu, cuda_version, library)


def _base() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdtool"


def _key(gpu: str, cuda_version: str, library: str) -> str:
    return re.sub(r"[^\w.]+", "-", f"{gpu}-cuda{cuda_version}-{library}")

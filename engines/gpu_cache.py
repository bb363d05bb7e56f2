"""Where what was learned on a GPU is kept between processes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal


def gpu_cache_path(kind: Literal["timing", "runtime"], *, gpu: str, cuda_version: str, library: str) -> Path:
    """Return the file of a cache that holds for one GPU model, CUDA version and library ("tensorrt10.14.1")."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = re.sub(r"[^\w.]+", "-", f"{gpu}-cuda{cuda_version}-{library}")
    return base / "bdtool" / kind / f"{key}.cache"

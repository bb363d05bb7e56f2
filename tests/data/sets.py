"""Small data sets, and a network that takes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bdtool.data.batches import ImageSource
from bdtool.specs import NetworkSpec, Preprocessing

NETWORK = NetworkSpec(
    arch="tiny",
    n_classes=3,
    labels=("cat", "ant", "dog"),
    preprocessing=Preprocessing(height=8, width=8, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
    stages=(),
    parts=(),
)
UNNAMED = dataclasses.replace(NETWORK, labels=None)
X = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1])


def npz(tmp_path: Path, **arrays: Any) -> str:
    np.savez(tmp_path / "set.npz", **arrays)
    return str(tmp_path / "set.npz")


def folders(root: Path, *names: str) -> str:
    """Write one image for each name such as "cat/0.png"; image i is X[i]."""
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(X[index % len(X)]).save(root / name)
    return str(root)


def all_images(source: ImageSource, batch_size: int) -> np.ndarray:
    return np.concatenate([batch.images for batch in source.batches(batch_size)])

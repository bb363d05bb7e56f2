"""What every data set gives: batches of images, with or without labels, read as they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from bdtool.errors import DataError

_DECODERS = 8  # threads at most


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images uint8 [N, H, W, 3], their labels int64 [N] where known, and a name for each, for messages."""

    images: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A data set that decodes an image only when a batch needs it; it can be walked any number of times.

    Attributes:
        description: one line for people, for instance "cifar10 (test) in data".
        is_real: False for synthetic pictures, on which accuracy and learned policies mean nothing.
        names: one name per image.
        labels: int64 [n_images], or None.
        image_at: returns image i as uint8 [height, width, 3] at the network's input size.
        picture_at: returns image i as uint8 [H, W, 3] in its own size, for training to crop; None where only
            `image_at` is known.
    """

    description: str
    is_real: bool
    names: Sequence[str]
    labels: np.ndarray | None
    image_at: Callable[[int], np.ndarray]
    picture_at: Callable[[int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise DataError(f"{self.description}: no images, expected at least one. Choose another data set")

    @property
    def n_images(self) -> int:
        return len(self.names)

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    def batches(self, batch_size: int, *, limit: int | None = None) -> Iterator[ImageBatch]:
        """Yield the images in order; the last batch may be smaller. `limit` stops after that many, None takes all."""
        if batch_size < 1 or (limit is not None and limit < 1):
            raise ValueError(f"batch_size and limit must be at least 1; got {batch_size} and {limit}")
        stop = self.n_images if limit is None else min(limit, self.n_images)
        return (self._read(first, min(first + batch_size, stop)) for first in range(0, stop, batch_size))

    def images_at(self, indices: Sequence[int]) -> np.ndarray:
        """Return the images of these numbers, uint8 [n, height, width, 3]; files are decoded side by side."""
        if self.picture_at is None:  # in memory
            return np.stack([self.image_at(index) for index in indices])
        with ThreadPoolExecutor(max_workers=min(_DECODERS, len(os.sched_getaffinity(0)))) as pool:
            return np.stack(list(pool.map(self.image_at, indices)))  # decoding lets other threads run

    def take(self, n_images: int) -> ImageBatch:
        """Return the first `n_images`, or all there are where the data set is smaller."""
        return next(self.batches(n_images, limit=n_images))

    def first(self, n_images: int | None) -> ImageSource:
        """Return the first `n_images` alone; None, or a smaller data set, gives all."""
        if n_images is None:
            return self
        if n_images < 1:
            raise ValueError(f"n_images must be at least 1; got {n_images}")
        labels = None if self.labels is None else self.labels[:n_images]
        return replace(self, names=self.names[:n_images], labels=labels)

    def drawn(self, n_images: int, *, seed: int) -> ImageSource:
        """Return that many images drawn without repetition, in the set's order: folders list one class after another.

        A smaller data set is returned as it is.
        """
        if n_images >= self.n_images:
            return self
        rows = np.sort(np.random.default_rng(seed).choice(self.n_images, size=n_images, replace=False))
        picture_at = self.picture_at
        return ImageSource(
            description=f"{n_images} of {self.description} (seed {seed})",
            is_real=self.is_real,
            names=[self.names[row] for row in rows],
            labels=None if self.labels is None else self.labels[rows],
            image_at=lambda index: self.image_at(int(rows[index])),
            picture_at=None if picture_at is None else lambda index: picture_at(int(rows[index])),
        )

    def _read(self, first: int, stop: int) -> ImageBatch:
        return ImageBatch(
            images=self.images_at(range(first, stop)),
            labels=None if self.labels is None else self.labels[first:stop],
            names=tuple(self.names[first:stop]),
        )

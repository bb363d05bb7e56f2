"""What every data set gives: batches of images, with or without labels, read as they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from bdtool.errors import DataError

_DECODERS = 8  # threads at most
_N_NAMED = 10  # pictures that an error names
_AT_ONCE = 64  # pictures that are looked through before the next ones


def evenly_spread(n_images: int, among: int) -> np.ndarray:
    """Return rows, int64, of at most `n_images` that stand for `among`: data sets may list one class after another."""
    return np.linspace(0, among - 1, min(n_images, among)).round().astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images uint8 [N, H, W, 3], their labels int64 [N] where known, and a name for each, for messages.

    `rows` int64 [N] are their numbers in the whole data set, whatever sample of it they were read from.
    """

    images: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]
    rows: np.ndarray


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
        rows: int64 [n_images], the images' numbers in the whole data set, of which this is a sample; None: it is whole.
        drawn_from: description and number of images of the set that this was drawn from; None: it was not drawn.
        name: what the set is called wherever it lies: "train.npz", "cifar10-train"; a sample has that of its set.
        origin: where the whole set lies, however that was written; "" where only the description tells sets apart.
    """

    description: str
    is_real: bool
    names: Sequence[str]
    labels: np.ndarray | None
    image_at: Callable[[int], np.ndarray]
    picture_at: Callable[[int], np.ndarray] | None = None
    rows: np.ndarray | None = None
    drawn_from: tuple[str, int] | None = None
    name: str = ""
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.names:
            raise DataError(f"{self.description}: no images, expected at least one. Choose another data set")

    @property
    def n_images(self) -> int:
        return len(self.names)

    @property
    def whole(self) -> tuple[str, int]:
        """Description and number of images of the whole set."""
        return self.drawn_from or (self.description, self.n_images)

    @property
    def numbers(self) -> np.ndarray:
        """int64 [n_images], the images' numbers in the whole set."""
        return np.arange(self.n_images) if self.rows is None else self.rows

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """Yield the images in order; the last batch may be smaller.

        Raises:
            DataError: a picture cannot be taken; the error names up to 10 such, from that batch on.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        stop = self.n_images
        return (self._read(first, min(first + batch_size, stop)) for first in range(0, stop, batch_size))

    def images_at(self, indices: Sequence[int]) -> np.ndarray:
        """Return the images of these numbers, uint8 [n, height, width, 3]; files are decoded side by side."""
        if self.picture_at is None:  # in memory
            return np.stack([self.image_at(index) for index in indices])
        with ThreadPoolExecutor(max_workers=min(_DECODERS, len(os.sched_getaffinity(0)))) as pool:
            return np.stack(list(pool.map(self.image_at, indices)))  # decoding lets other threads run

    def take(self, n_images: int) -> ImageBatch:
        """Return a sample of the data set in one batch: as many images as that, drawn as by `drawn`."""
        return next(self.drawn(n_images).batches(n_images))

    def drawn(self, n_images: int | None, *, seed: int = 0) -> ImageSource:
        """Return a sample that stands for the set: folders list one class after another, so the first would not.

        That many images are drawn without repetition, the same ones whenever the same set is asked with the same seed,
        and all of them among those of a larger sample: 512 of 1,000 drawn are the 512 that the set gives. They keep
        the set's order, in which files are read best. None, or a smaller data set, gives all.
        """
        if n_images is None or n_images >= self.n_images:
            return self
        if n_images < 1:
            raise ValueError(f"n_images must be at least 1; got {n_images}")
        rows = self.numbers
        lots = np.random.default_rng(seed).random(int(rows.max()) + 1)  # the same for an image in every sample
        chosen = np.sort(np.argsort(lots[rows], kind="stable")[:n_images])
        whole, n_whole = self.whole
        sample = self._chosen(chosen, description=f"{whole}, drawn from {n_whole:,} images with seed {seed}")
        return replace(sample, drawn_from=self.whole)

    def shared_with(self, other: ImageSource) -> np.ndarray:
        """Return which images are in `other`, too, bool [n_images]; sets of different origins share none."""
        mine, theirs = (source.origin or source.whole[0] for source in (self, other))
        return np.isin(self.numbers, other.numbers) & (mine == theirs)

    def without(self, other: ImageSource, *, description: str) -> ImageSource:
        """Return the images that are not in `other`, as a set that is described so.

        Raises:
            DataError: there are none.
        """
        return self._chosen(np.flatnonzero(~self.shared_with(other)), description=description)

    def _chosen(self, indices: np.ndarray, *, description: str) -> ImageSource:
        picture_at = self.picture_at
        return ImageSource(
            description=description,
            is_real=self.is_real,
            names=[self.names[index] for index in indices],
            labels=None if self.labels is None else self.labels[indices],
            image_at=lambda index: self.image_at(int(indices[index])),
            picture_at=None if picture_at is None else lambda index: picture_at(int(indices[index])),
            rows=self.numbers[indices],
            name=self.name,
            origin=self.origin,
        )

    def _read(self, first: int, stop: int) -> ImageBatch:
        try:
            images = self.images_at(range(first, stop))
        except DataError as exc:
            raise self._problem_from(first, exc) from exc
        return ImageBatch(
            images=images,
            labels=None if self.labels is None else self.labels[first:stop],
            names=tuple(self.names[first:stop]),
            rows=self.numbers[first:stop],
        )

    def _problem_from(self, first: int, found: DataError) -> DataError:
        """Return an error that names up to 10 pictures that cannot be taken, of those from `first` on.

        Whoever mends a set wants to know them all. The pictures before `first` were read; those after it are read now
        in place of later, until 10 are found.
        """
        if self.picture_at is None:  # in memory all are of one size
            return found
        problems = list(islice(self._problems(first), _N_NAMED))
        if len(problems) < 2:
            return found
        more = ", and maybe more," if len(problems) == _N_NAMED else ""
        lines = "\n".join(f"  {problem}" for problem in problems)
        return DataError(f"{self.description}: {len(problems)} pictures{more} cannot be taken:\n{lines}")

    def _problems(self, first: int) -> Iterator[str]:
        def problem_at(index: int) -> str | None:
            try:
                self.image_at(index)
            except DataError as exc:
                return str(exc)
            return None

        with ThreadPoolExecutor(max_workers=min(_DECODERS, len(os.sched_getaffinity(0)))) as pool:
            for start in range(first, self.n_images, _AT_ONCE):
                indices = range(start, min(start + _AT_ONCE, self.n_images))
                yield from filter(None, pool.map(problem_at, indices))

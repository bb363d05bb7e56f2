"""Images to train on, augmented and normalised a batch at a time: small ones in memory, large ones from their files."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from bdtool.data.batches import ImageSource
from bdtool.errors import DataError
from bdtool.specs import Preprocessing
from bdtool.training.augmentation import N_CROP_FLIP, N_RESIZED_CROP, crop_and_flip, flip, random_resized_crop
from bdtool.training.options import Augment

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer


class TrainingImages(Protocol):
    """A labelled data set that gives augmented batches; `n_uniforms` numbers in [0, 1) drive one image's draw.

    `facts` says which data set it is wherever it lies: its name without directories, n_images, and a digest.
    """

    n_images: int
    n_uniforms: int
    facts: dict[str, str | int]

    def batch(self, index: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Return preprocessed images float32 [n, 3, H, W], channels last, and labels int64 [n], on the device.

        Args:
            index: int64 [n], on the CPU.
            uniforms: float32 [n, n_uniforms], on the CPU.
        """


class MemoryImages:
    """Small images, held as uint8 on the training device: 150 MB for CIFAR's 50,000.

    Raises:
        DataError: the data set has no labels.
    """

    n_uniforms = N_CROP_FLIP

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        augment: Augment = "crop",
    ) -> None:
        pixels, labels = read_all(source)
        self._augmented = crop_and_flip if augment == "crop" else flip
        self.n_images = len(pixels)
        self.facts = data_facts(source, pixels.data, labels.data)
        self._device = device
        self._pixels = torch.from_numpy(pixels).to(device)
        self._labels = torch.from_numpy(labels).to(device)
        self._normalize = Normalize(preprocessing, device=device)

    def batch(self, index: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self._device)
        pixels = self._augmented(self._pixels[index], uniforms.to(self._device))
        return self._normalize(pixels), self._labels[index]


class PictureFiles:
    """Picture files, decoded and cropped at random when their batch is drawn: ImageNet, and folders like it."""

    n_uniforms = N_RESIZED_CROP

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        augment: Augment = "crop",
    ) -> None:
        assert source.picture_at is not None
        self._source, self._augment = source, augment
        labels = _labels(source)
        self._labels = torch.from_numpy(labels)
        self.n_images = len(labels)
        names = "\n".join(source.names).encode()  # reading a million pictures would take too long
        self.facts = data_facts(source, names, labels.data)
        self._picture_at = source.picture_at
        self._input = preprocessing
        self._device = device
        self._normalize = Normalize(preprocessing, device=device)

    def batch(self, index: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        with ThreadPoolExecutor() as pool:  # Pillow decodes and scales outside Python's lock
            pixels = np.stack(list(pool.map(self._picture, index.tolist(), uniforms.tolist())))
        return self._normalize(torch.from_numpy(pixels).to(self._device)), self._labels[index].to(self._device)

    def _picture(self, index: int, uniforms: list[float]) -> np.ndarray:
        if self._augment == "crop":
            height, width, how = self._input.height, self._input.width, self._input.interpolation
            return random_resized_crop(self._picture_at(index), uniforms, height=height, width=width, how=how)
        pixels = self._source.image_at(index)
        return pixels if uniforms[-1] < 0.5 else pixels[:, ::-1]


def training_images(
    source: ImageSource,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    augment: Augment = "crop",
) -> TrainingImages:
    """Return a data set augmented as its kind usually is: files of large pictures by random crops, else shifts.

    With `augment` "flip", images are as the deployed network gets them, flipped half of the time.

    Raises:
        DataError: it has no labels.
    """
    kind = PictureFiles if source.picture_at is not None and preprocessing.resize is not None else MemoryImages
    return kind(source, preprocessing, device=device, augment=augment)


class Normalize:
    """(pixel / 255 - mean) / std, from uint8 [N, H, W, 3] to float32 [N, 3, H, W] in channels-last layout."""

    def __init__(self, preprocessing: Preprocessing, *, device: torch.device) -> None:
        mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
        self._scale = torch.tensor(1 / (255 * std), dtype=torch.float32, device=device)
        self._offset = torch.tensor(-mean / std, dtype=torch.float32, device=device)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels * self._scale + self._offset).permute(0, 3, 1, 2)


def read_all(source: ImageSource) -> tuple[np.ndarray, np.ndarray]:
    """Return the images uint8 [N, H, W, 3] and labels int64 [N] of a data set.

    Raises:
        DataError: it has no labels.
    """
    labels = _labels(source)
    first = source.image_at(0)
    pixels = np.empty((source.n_images, *first.shape), dtype=np.uint8)

    def read(index: int) -> None:
        pixels[index] = source.image_at(index)

    with ThreadPoolExecutor() as pool:  # decoding a file lets other threads run
        for _ in pool.map(read, range(source.n_images)):
            pass
    return pixels, labels


def _labels(source: ImageSource) -> np.ndarray:
    if source.labels is None:
        raise DataError(
            f"no labels in {source.description}; training needs them: an .npz with y, or one folder a class"
        )
    return source.labels


def data_facts(source: ImageSource, *content: Buffer) -> dict[str, str | int]:
    """Return what to record of a data set: name, number of images, and the digest of `content`."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    return {"name": source.name, "n_images": source.n_images, "sha256": digest.hexdigest()}

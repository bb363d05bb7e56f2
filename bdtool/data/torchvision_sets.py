"""`cifar10:ROOT`, `cifar100:ROOT` and `imagenet:ROOT`: public sets in torchvision's layouts, never downloaded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.data.folders import file_source
from bdtool.data.npz import array_source
from bdtool.errors import DataError
from bdtool.specs import NetworkSpec

Split = Literal["train", "test"]
N_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def torchvision_source(name: str, root: Path, *, network: NetworkSpec, resize: bool, split: Split) -> ImageSource:
    """Open one of torchvision's data sets; ImageNet's "test" is its validation split, whose labels are public.

    Raises:
        DataError: files are missing or damaged, or the model has another number of classes.
    """
    if network.n_classes != N_CLASSES[name]:
        raise DataError(
            f"{name}: has {N_CLASSES[name]} classes, the model has {network.n_classes}. "
            "Choose the data set that the model was trained on"
        )
    open_set = _imagenet_source if name == "imagenet" else _cifar_source
    return open_set(name, root, network=network, resize=resize, split=split)


def _cifar_source(name: str, root: Path, *, network: NetworkSpec, resize: bool, split: Split) -> ImageSource:
    from torchvision import datasets

    dataset_class = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        # torchvision compares every file with a known digest before it unpickles it
        dataset = dataset_class(root, train=split == "train", download=False)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as exc:
        raise DataError(
            f"{name}:{root}: data set not found or damaged. Expected the unpacked archive "
            f"at {root / _CIFAR_FOLDERS[name]}; "
            f"torchvision.datasets.{dataset_class.__name__}(ROOT, download=True) fetches it"
        ) from exc
    return array_source(
        dataset.data,
        np.asarray(dataset.targets, dtype=np.int64),
        description=f"{name} ({split}) in {root}",
        preprocessing=network.preprocessing,
        resize=resize,
        name=f"{name}-{split}",
    )


def _imagenet_source(name: str, root: Path, *, network: NetworkSpec, resize: bool, split: Split) -> ImageSource:
    from torchvision import datasets

    folder = "train" if split == "train" else "val"
    # looked at first: where they are missing torchvision would start to unpack archives, which takes hours and disk
    if not (root / "meta.bin").is_file() or not (root / folder).is_dir():
        raise DataError(_imagenet_help(root, folder, problem="files are missing"))
    try:
        dataset = datasets.ImageNet(root, split=folder)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as exc:
        raise DataError(_imagenet_help(root, folder, problem=str(exc))) from exc
    if len(dataset.wnids) != N_CLASSES[name]:
        raise DataError(_imagenet_help(root, folder, problem=f"got {len(dataset.wnids)} class folders"))
    return file_source(
        [Path(path) for path, _ in dataset.samples],
        np.asarray(dataset.targets, dtype=np.int64),
        root=root,
        preprocessing=network.preprocessing,
        resize=resize,
        description=f"{name} ({folder}) in {root}",
    )


def _imagenet_help(root: Path, folder: str, *, problem: str) -> str:
    return (
        f"imagenet:{root}: {problem}. Expected {root / 'meta.bin'} and 1000 class folders such as "
        f"{root / folder / 'n01440764'}; torchvision.datasets.ImageNet(ROOT, split={folder!r}) unpacks the archives"
    )

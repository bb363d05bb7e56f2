"""`cifar10:ROOT`, `cifar100:ROOT` and `imagenet:ROOT`: public sets in torchvision's layouts, never downloaded."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.data.folders import file_source
from bdtool.data.layouts import CIFAR_FILES, CIFAR_FOLDERS, Split
from bdtool.data.npz import array_source
from bdtool.errors import DataError
from bdtool.specs import NetworkSpec

N_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


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


def directory_of_set(name: str, root: Path) -> Path:
    """Return the directory, `root` or one in it, that the files of one of these data sets are read from."""
    return root if name not in CIFAR_FOLDERS or _is_unpacked_folder(name, root) else root / CIFAR_FOLDERS[name]


def _is_unpacked_folder(name: str, root: Path) -> bool:
    """Say whether `root` is what CIFAR's archive unpacks to, rather than the directory that it was unpacked in."""
    return all((root / file).is_file() for file in CIFAR_FILES[name])


def _cifar_source(name: str, root: Path, *, network: NetworkSpec, resize: bool, split: Split) -> ImageSource:
    from torchvision import datasets

    dataset_class = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    if _is_unpacked_folder(name, root):
        dataset_class = type(dataset_class.__name__, (dataset_class,), {"base_folder": ""})
    try:
        # torchvision compares every file with a known digest before it unpickles it
        dataset = dataset_class(root, train=split == "train", download=False)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as exc:
        raise DataError(
            f"{name}:{root}: data set not found or damaged. Expected the unpacked archive "
            f"at {root / CIFAR_FOLDERS[name]}, or its files in {root} itself; "
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
        name=f"{name}-{folder}",
    )


def _imagenet_help(root: Path, folder: str, *, problem: str) -> str:
    return (
        f"imagenet:{root}: {problem}. Expected {root / 'meta.bin'} and 1000 class folders such as "
        f"{root / folder / 'n01440764'}; torchvision.datasets.ImageNet(ROOT, split={folder!r}) unpacks the archives"
    )

"""DATA: what a user writes after `--data`, opened as an `ImageSource`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from bdtool.data.batches import ImageBatch, ImageSource
from bdtool.data.folders import class_folders, folder_source
from bdtool.data.layouts import Labels, Split
from bdtool.data.npz import npz_source
from bdtool.data.synthetic import synthetic_image
from bdtool.data.torchvision_sets import N_CLASSES, directory_of_set, torchvision_source
from bdtool.errors import UsageError
from bdtool.specs import NetworkSpec

__all__ = ["ImageBatch", "ImageSource", "class_names", "open_data"]

DATA_FORMS = (
    "FILE.npz (x uint8 [N, H, W, 3], optional y [N]), a directory with a folder per class, a directory of images, "
    "cifar10:ROOT, cifar100:ROOT, imagenet:ROOT, synthetic[:N[:SEED]]"
)
_N_SYNTHETIC = 64
_SYNTHETIC = re.compile(r"synthetic(?::(?P<n>[0-9]{1,7})(?::(?P<seed>[0-9]{1,18}))?)?")
_TORCHVISION = re.compile(r"(?P<name>cifar10|cifar100|imagenet):(?P<root>.+)", re.DOTALL)


def open_data(
    data: str, *, network: NetworkSpec, resize: bool = False, split: Split = "test", labels: Labels = "strict"
) -> ImageSource:
    """Open a data set and check that its first image fits the network.

    Args:
        data: one of `DATA_FORMS`.
        network: gives the input size, the classes and their labels.
        resize: scale and crop images of another size instead of refusing them.
        split: which part of a torchvision data set; files and directories have one part only.
        labels: "strict" refuses class folders that are not the model's classes; "optional" takes their images without
            labels, and logs a warning that says why.

    Raises:
        UsageError: no such form, or nothing there.
        DataError: no images, or images and labels that do not fit the network.
    """
    source = _open_form(data, network=network, resize=resize, split=split, labels=labels)
    source.image_at(0)  # refuse what cannot fit now, not after minutes of building
    place = path_from_data(data)
    if place is None:
        return source
    part = f" ({split})" if has_splits(data) else ""  # not its name, which a symbolic link may change
    return replace(source, origin=f"{place.resolve()}{part}")


def class_names(data: str) -> tuple[str, ...] | None:
    """Return the names of the class folders of a DATA, in the order of their numbers; None where it has none."""
    is_folder = data and not _TORCHVISION.fullmatch(data) and Path(data).is_dir()
    return class_folders(Path(data)) if is_folder else None


def has_splits(data: str) -> bool:
    """Say whether a DATA has a part to train on and one to test on."""
    return _TORCHVISION.fullmatch(data) is not None


def path_from_data(data: str) -> Path | None:
    """Return the file or directory that a DATA reads, whether it is there or not; None where it reads none."""
    if data.split(":", 1)[0] == "synthetic":
        return None
    if match := _TORCHVISION.fullmatch(data):
        return directory_of_set(match["name"], Path(match["root"]).expanduser())
    return Path(data) if data else None


def _open_form(data: str, *, network: NetworkSpec, resize: bool, split: Split, labels: Labels) -> ImageSource:
    if data.split(":", 1)[0] == "synthetic":
        return _synthetic_source(data, network=network)
    if match := _TORCHVISION.fullmatch(data):
        root = Path(match["root"]).expanduser()  # a shell leaves the ~ after a colon alone
        return torchvision_source(match["name"], root, network=network, resize=resize, split=split)
    path = Path(data)
    if data and path.is_dir():
        return folder_source(path, network=network, resize=resize, split=split, labels=labels)
    if path.suffix.lower() == ".npz" and path.is_file():
        return npz_source(path, network=network, resize=resize)
    if data.rstrip(":") in N_CLASSES:
        problem = f"which directory? Write {data.rstrip(':')}:ROOT"
    else:
        problem = "not a form of DATA" if path.is_file() else "no such file, directory or data set"
    raise UsageError(f"{data!r}: {problem}. DATA is one of: {DATA_FORMS}")


def _synthetic_source(data: str, *, network: NetworkSpec) -> ImageSource:
    match = _SYNTHETIC.fullmatch(data)
    if match is None:
        raise UsageError(f"{data!r}: expected synthetic[:N[:SEED]] with whole numbers, for instance synthetic:64:0")
    n_images, seed = int(match["n"] or _N_SYNTHETIC), int(match["seed"] or 0)
    height, width = network.preprocessing.height, network.preprocessing.width
    return ImageSource(
        description=f"{n_images} synthetic pictures (seed {seed}), not real images",
        is_real=False,
        names=tuple(f"synthetic-{seed}[{index}]" for index in range(n_images)),
        labels=None,
        image_at=lambda index: synthetic_image(index, height=height, width=width, seed=seed),
        name=f"synthetic-{seed}",
    )

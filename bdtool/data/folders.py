"""Directories of image files: ImageFolder layout with a folder per class, or just images without labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.data.images import IMAGE_SUFFIXES, fit_image, read_image
from bdtool.data.layouts import Split
from bdtool.data.other_forms import other_form
from bdtool.errors import DataError, UsageError
from bdtool.specs import NetworkSpec, Preprocessing

_SPLIT_FOLDERS = frozenset({"train", "val", "valid", "validation", "test"})


def folder_source(root: Path, *, network: NetworkSpec, resize: bool, split: Split) -> ImageSource:
    """Open a directory: with images in its folders these are the classes, otherwise its own images have no labels.

    `split` is what is wanted of a data set that a directory turns out to be, to say how to name it.

    Raises:
        DataError: no images, images at both levels, or class folders that do not match the model's classes.
        UsageError: no images, but what has another form of DATA.
    """
    loose = sorted(path for path in root.iterdir() if _is_image(path.name) and path.is_file())
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {folder.name: _image_files(folder) for folder in folders}
    if not any(files.values()):
        if not loose and (other := other_form(root, split=split)):
            raise UsageError(f"{root}: no images in it; {other}")
        return file_source(loose, None, root=root, preprocessing=network.preprocessing, resize=resize)
    if loose:
        raise DataError(
            f"{root}: has {len(loose)} images beside folders with images, expected one or the other. "
            "Move them into their class folders, or pass a directory that holds images only"
        )
    classes = _class_numbers(tuple(files), network=network, root=root)
    paths = [path for name in files for path in files[name]]
    labels = np.repeat([classes[name] for name in files], [len(files[name]) for name in files]).astype(np.int64)
    return file_source(paths, labels, root=root, preprocessing=network.preprocessing, resize=resize)


def file_source(
    paths: Sequence[Path],
    labels: np.ndarray | None,
    *,
    root: Path,
    preprocessing: Preprocessing,
    resize: bool,
    description: str | None = None,
) -> ImageSource:
    """Return a source over image files below `root`; each is decoded when its batch is read."""
    if not paths:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{root}: no images in it, expected files named {suffixes}. Check the directory")

    def image_at(index: int) -> np.ndarray:
        path = paths[index]
        return fit_image(read_image(path), preprocessing, source=str(path), resize=resize)

    names = tuple(path.relative_to(root).as_posix() for path in paths)
    return ImageSource(
        description=description or str(root),
        is_real=True,
        names=names,
        labels=labels,
        image_at=image_at,
        picture_at=lambda index: read_image(paths[index]),
    )


def _class_numbers(folders: tuple[str, ...], *, network: NetworkSpec, root: Path) -> dict[str, int]:
    """Match folder names to classes: by the model's labels where they are known, else in alphabetical order."""
    times = Counter(network.labels or ())  # ImageNet's labels name two classes "crane"
    unknown = [name for name in folders if times[name] != 1]
    if not unknown:
        return {name: (network.labels or ()).index(name) for name in folders}
    if len(unknown) < len(folders):
        raise DataError(
            f"{root}: class folders {', '.join(unknown)} are not among the model's labels, while others are. "
            "Name every folder after one label (`bdtool inspect MODEL` lists them)"
        )
    if set(folders) <= _SPLIT_FOLDERS:
        raise DataError(f"{root}: folders {', '.join(folders)} look like splits, expected classes. Pass one of them")
    if len(folders) != network.n_classes:
        raise DataError(
            f"{root}: got {len(folders)} class folders, the model has {network.n_classes} classes. Name the folders "
            "after the model's labels, or give one folder for every class, in alphabetical order; `train pretrain` "
            f"takes --classes {len(folders)}"
        )
    return {name: number for number, name in enumerate(folders)}


def _image_files(folder: Path) -> list[Path]:
    paths: list[Path] = []
    for parent, _, names in os.walk(folder):
        paths.extend(Path(parent, name) for name in names if _is_image(name))
    return sorted(paths)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES

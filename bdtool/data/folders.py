"""Directories of image files: ImageFolder layout with a folder per class, or just images without labels."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bdtool.data import imagenet
from bdtool.data.batches import ImageSource
from bdtool.data.images import IMAGE_SUFFIXES, fit_image, read_image
from bdtool.data.layouts import Labels, Split
from bdtool.data.other_forms import other_form
from bdtool.errors import DataError, UsageError
from bdtool.specs import NetworkSpec, Preprocessing

logger = logging.getLogger(__name__)

_SPLIT_FOLDERS = frozenset({"train", "val", "valid", "validation", "test"})
_N_SHOWN = 3


class _OtherClasses(DataError):
    """Folders that are not the model's classes; `problem` says in which way, the message also what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}. {remedy}; or classify the images without labels: `bdtool run BUNDLE IMAGE...`")
        self.problem = problem


def folder_source(root: Path, *, network: NetworkSpec, resize: bool, split: Split, labels: Labels) -> ImageSource:
    """Open a directory: with images in its folders these are the classes, otherwise its own images have no labels.

    `split` is what is wanted of a data set that a directory turns out to be, to say how to name it. Where `labels` are
    optional, images in folders that are not the model's classes have none, either, and a warning says so.

    Raises:
        DataError: no images, images at both levels, or class folders that do not match the model's classes.
        UsageError: no images, but what has another form of DATA.
    """
    loose = sorted(path for path in root.iterdir() if _is_image(path.name) and path.is_file())
    files = {folder.name: _image_files(folder) for folder in _folders(root)}
    if not any(files.values()):
        if not loose and (other := other_form(root, split=split)):
            raise UsageError(f"{root}: no images in it; {other}")
        return file_source(loose, None, root=root, preprocessing=network.preprocessing, resize=resize)
    if loose:
        raise DataError(
            f"{root}: has {len(loose)} images beside folders with images, expected one or the other. "
            "Move them into their class folders, or pass a directory that holds images only"
        )
    paths = [path for name in files for path in files[name]]
    numbers = None
    try:
        classes = _class_numbers(files, network=network, root=root)
        numbers = np.array([classes[name] for name in files for _ in files[name]], dtype=np.int64)
    except _OtherClasses as exc:
        if labels == "strict":
            raise
        logger.warning("%s. Its images are taken without labels", exc.problem)
    return file_source(paths, numbers, root=root, preprocessing=network.preprocessing, resize=resize)


def refuse_splits(root: Path) -> None:
    """Raise a `DataError` of a directory whose folders are the parts of a data set, as train and test, not classes."""
    _refuse_splits(tuple(folder.name for folder in _folders(root)), root=root)


def _refuse_splits(folders: tuple[str, ...], *, root: Path) -> None:
    if folders and set(folders) <= _SPLIT_FOLDERS:
        raise DataError(f"{root}: folders {', '.join(folders)} look like splits, expected classes. Pass one of them")


def class_folders(root: Path) -> tuple[str, ...] | None:
    """Return the names of the classes of a directory, in the order of their numbers; None where it has no classes.

    Raises:
        DataError: some of its folders have no image.
    """
    has_images = {folder.name: any(True for _ in _images_below(folder)) for folder in _folders(root)}
    if not any(has_images.values()) or set(has_images) <= _SPLIT_FOLDERS:
        return None
    if empty := [name for name, has_some in has_images.items() if not has_some]:
        raise DataError(
            f"{root}: no image in folders {_some(empty)}. Remove them, or put the images of a class into each"
        )
    return tuple(has_images)


def file_source(
    paths: Sequence[Path],
    labels: np.ndarray | None,
    *,
    root: Path,
    preprocessing: Preprocessing,
    resize: bool,
    description: str | None = None,
    name: str | None = None,
) -> ImageSource:
    """Return a source over image files below `root`, after which it is called; each is decoded when it is read."""
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
        name=name or root.resolve().name,
    )


def _class_numbers(files: Mapping[str, Sequence[Path]], *, network: NetworkSpec, root: Path) -> dict[str, int]:
    """Match folder names to classes: by the model's labels where these are known, else in alphabetical order."""
    folders, labels = tuple(files), network.labels or ()
    named = classes_by_label(folders, labels)
    unknown = ", ".join(name for name in folders if files[name] and name not in named)
    if named and not unknown:
        return _one_for_each(named, labels=labels, root=root)
    if named:
        raise _OtherClasses(
            f"{root}: class folders {unknown} are not among the model's labels ({_some(labels)}), while others are",
            "Name every folder after one label (`bdtool inspect MODEL` lists them)",
        )
    _refuse_splits(folders, root=root)
    if labels:
        return _classes_by_id(folders, labels=labels, root=root)
    if len(folders) != network.n_classes:
        empty = [name for name in folders if not files[name]]
        got = f"{len(folders)} class folders" + (f" ({_some(empty)} without an image)" if empty else "")
        raise _OtherClasses(
            f"{root}: got {got}, the model has {network.n_classes} classes without names",
            "Give one folder for every class, in alphabetical order",
        )
    return {name: number for number, name in enumerate(folders)}


def classes_by_label(folders: Collection[str], labels: Sequence[str]) -> dict[str, int]:
    """Return the classes of the folders that are named after one label; upper or lower case comes second."""
    found: dict[str, int] = {}
    for form in (_composed, _folded):
        forms = [form(label) for label in labels]
        times = Counter(forms)  # ImageNet's labels name two classes "crane"
        classes = {one: number for number, one in enumerate(forms) if times[one] == 1}
        found = {name: classes[form(name)] for name in folders if form(name) in classes} | found
    return found


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # some systems write folder names in the other form, "e" and an accent


def _folded(name: str) -> str:
    return _composed(_composed(name).casefold())


def _one_for_each(classes: dict[str, int], *, labels: Sequence[str], root: Path) -> dict[str, int]:
    times = Counter(classes.values())
    if twice := [name for name, number in classes.items() if times[number] > 1]:
        label = labels[classes[twice[0]]]
        raise _OtherClasses(
            f"{root}: class folders {', '.join(name for name in twice if labels[classes[name]] == label)} are all the "
            f"label {label}, expected one folder for each",
            "Put their images together",
        )
    return classes


def _classes_by_id(folders: Sequence[str], *, labels: Sequence[str], root: Path) -> dict[str, int]:
    """Take folders that are no labels but the numbers of all classes, or ids of ImageNet's, of which some will do."""
    ids, classes = "class numbers", _all_numbers(folders, n_classes=len(labels))
    if classes is None and len(labels) == imagenet.N_CLASSES:
        ids, classes = "WordNet ids", imagenet.classes_of_ids(folders)
    if classes is None:
        raise _OtherClasses(
            f"{root}: no class folder ({_some(folders)}) has the name of a label of the model ({_some(labels)})",
            "Rename the folders (`bdtool inspect MODEL` lists the labels), or use a MODEL of these classes: "
            "`bdtool train pretrain` takes their names, `bdtool import` those of --labels FILE",
        )
    named = [f"{name} is {labels[number]}" for name, number in classes.items()]
    shown = ", ".join((*named[: min(_N_SHOWN, len(named) - 1)], named[-1]))
    logger.warning("%s: class folders are not named after the model's labels, and taken as %s: %s", root, ids, shown)
    return classes


def _all_numbers(folders: Sequence[str], *, n_classes: int) -> dict[str, int] | None:
    if not all(re.fullmatch("[0-9]+", name) for name in folders):
        return None
    classes = {name: int(name) for name in sorted(folders, key=int)}
    return classes if list(classes.values()) == list(range(n_classes)) else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_N_SHOWN]) + (", ..." if len(names) > _N_SHOWN else "")


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder == "__MACOSX"  # which macOS puts into archives beside the folders


def _image_files(folder: Path) -> list[Path]:
    return sorted(_images_below(folder))


def _images_below(folder: Path, *, above: frozenset[tuple[int, int]] | None = None) -> Iterator[Path]:
    """Yield the images of a class folder and of the folders in it, following links but not back to one `above`."""
    above = frozenset({_identity(folder.parent)}) if above is None else above
    here = _identity(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            # a link in a circle is no directory, where entry.is_dir() raises
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                yield from _images_below(Path(entry), above=above | {here})
            elif _is_image(entry.name):
                yield Path(entry)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES

"""What a new base is: the architecture's own layout, with the classes and colours of its data. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from bdtool.data import imagenet
from bdtool.data.folders import classes_by_label, refuse_splits
from bdtool.data.sources import DATA_FORMS, class_names
from bdtool.data.torchvision_sets import N_CLASSES
from bdtool.errors import UsageError
from bdtool.models.architectures import Architecture, architecture
from bdtool.models.checkpoint_formats import (
    BLOCKDROP,
    CIFAR10_MEAN,
    CIFAR10_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Colour,
    GivenInput,
    default_labels,
    default_preprocessing,
)
from bdtool.models.model_spec import ModelSpec


def base_spec(
    arch: str,
    *,
    data: str,
    n_classes: int | None = None,
    mean: Colour | None = None,
    std: Colour | None = None,
    downscale: int = 1,
    size: int | None = None,
    resize: int | None = None,
) -> ModelSpec:
    """Return what to pretrain: the architecture with its own shortcut, and the classes and colours of the data.

    Args:
        data: a DATA form; cifar10, cifar100 and imagenet say which classes there are, class folders have their names.
            Of an .npz there are 10 or, for ImageNet's architectures, 1000, without names, unless `n_classes` says
            otherwise.
        mean, std: of pixels scaled to 0..1; None is CIFAR-10's or ImageNet's.
        size: pixels of the input, square; None is the architecture's usual one.
        resize: pixels that the shorter side of a picture is scaled to first; None is usual for that size.
        downscale: the network first averages `downscale` x `downscale` pixels into one.

    Raises:
        UsageError: unknown architecture, impossible colours, or other than `n_classes` class folders.
    """
    layout = architecture(arch)
    classes, labels = classes_of(data, layout, n_classes=n_classes, usual=10 if layout.family == "cifar" else 1000)
    usual_mean, usual_std = (CIFAR10_MEAN, CIFAR10_STD) if layout.family == "cifar" else (IMAGENET_MEAN, IMAGENET_STD)
    try:
        preprocessing = default_preprocessing(
            BLOCKDROP,
            layout,
            n_classes=classes,
            given=GivenInput(mean=mean or usual_mean, std=std or usual_std, size=size, resize=resize),
        )
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    return ModelSpec(
        arch=arch,
        n_classes=classes,
        labels=labels,
        preprocessing=preprocessing,
        shortcut=layout.default_shortcut,
        has_policy=False,
        provenance={},
        downscale=downscale,
    )


def classes_of(
    data: str, layout: Architecture, *, n_classes: int | None = None, usual: int | None = None
) -> tuple[int, tuple[str, ...] | None]:
    """Return how many classes there are, and their names where they have some.

    Args:
        data: a DATA form, as for `base_spec`.
        n_classes: what was asked for.
        usual: of data that does not say it; None refuses such data.

    Raises:
        UsageError: nothing says how many classes there are, as there is no such data or it has no class folders; or
            there are other than `n_classes` of these.
        DataError: its folders are the parts of a data set, not classes.
    """
    folders = class_names(data)
    classes = n_classes or N_CLASSES.get(data.partition(":")[0]) or len(folders or ()) or usual
    if not classes and not Path(data).exists():
        raise UsageError(f"{data!r}: no such file, directory or data set. DATA is one of: {DATA_FORMS}")
    if not classes:
        if Path(data).is_dir():
            refuse_splits(Path(data))
        raise UsageError(f"{data}: does not say how many classes there are; give --classes N")
    return classes, _labels(layout, data, folders, n_classes=classes)


def _are_ids(folders: tuple[str, ...], labels: tuple[str, ...]) -> bool:
    return len(labels) == imagenet.N_CLASSES and imagenet.classes_of_ids(folders) is not None


def _labels(
    layout: Architecture, data: str, folders: tuple[str, ...] | None, *, n_classes: int
) -> tuple[str, ...] | None:
    """Return the names of the classes: the class folders', unless these are CIFAR-10's, or ImageNet's or its ids."""
    usual = default_labels(layout, n_classes=n_classes)
    if data.partition(":")[0] in N_CLASSES:
        return usual
    if folders is None:
        return None
    if usual and (len(classes_by_label(folders, usual)) == len(folders) or _are_ids(folders, usual)):
        return usual
    if len(folders) != n_classes:
        raise UsageError(
            f"{data}: got {len(folders)} class folders, {n_classes} classes were asked for. Leave --classes out, or "
            "give one folder for every class"
        )
    return folders

"""The classes of ImageNet (ILSVRC 2012) by their WordNet ids, which its folders and subsets of it are named after."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib import resources

N_CLASSES = 1000


def classes_of_ids(names: Collection[str]) -> dict[str, int] | None:
    """Return the numbers of classes by their ids; None where a name is no id of an ImageNet class."""
    numbers = _numbers()
    return {name: numbers[name] for name in names} if numbers.keys() >= set(names) else None


@cache
def _numbers() -> dict[str, int]:
    """Read the ids, which are sorted: torchvision, as others, numbers the classes in this order."""
    ids = resources.files("bdtool.data").joinpath("imagenet_ids.txt").read_text(encoding="ascii").split()
    return {name: number for number, name in enumerate(ids)}

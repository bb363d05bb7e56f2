"""Which ResNets there are, as plain data. Loads no torch, so the command line can list and check names quickly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from bdtool.errors import UsageError

Family = Literal["cifar", "imagenet"]
BlockKind = Literal["basic", "bottleneck"]
ShortcutKind = Literal["option-a", "average-pool", "projection"]

# He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1 (ImageNet) and section 4.2 (CIFAR).
_IMAGENET: dict[str, tuple[BlockKind, tuple[int, ...]]] = {
    "resnet10": ("basic", (1, 1, 1, 1)),  # not in that table: the policy network of BlockDrop
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
_COMMON_CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The layout of a ResNet: everything about it but the number of classes.

    `stages` is the number of blocks per stage and `widths` the channels of each stage's 3x3 convolutions (a bottleneck
    stage puts out four times as many). `image_size` is in pixels, square.
    """

    name: str
    family: Family
    block: BlockKind
    stages: tuple[int, ...]
    widths: tuple[int, ...]
    image_size: int
    default_shortcut: ShortcutKind

    @property
    def n_blocks(self) -> int:
        return sum(self.stages)

    @property
    def expansion(self) -> int:
        """Output channels of a block over the channels of its 3x3 convolutions."""
        return 4 if self.block == "bottleneck" else 1


def known_architectures() -> tuple[str, ...]:
    """Return the names worth listing; `architecture` also takes every other CIFAR depth 6n + 2."""
    return _COMMON_CIFAR + tuple(_IMAGENET)


def architecture(name: str) -> Architecture:
    """Return the ResNet called `name`: the ImageNet depths, and `resnet{6n+2}` with n >= 1 for CIFAR.

    resnet50 and resnet152 are also of the form 6n + 2; these names mean the ImageNet networks, as everywhere.

    Raises:
        UsageError: there is no such ResNet.
    """
    if name in _IMAGENET:
        block, stages = _IMAGENET[name]
        return imagenet_resnet(name, block=block, stages=stages)
    match = re.fullmatch(r"resnet([1-9][0-9]{0,4})", name)
    depth = int(match[1]) if match else 0
    if depth < 8 or depth % 6 != 2:
        raise UsageError(
            f"unknown architecture {name!r}; known: {', '.join(known_architectures())}, "
            "and resnet{6n+2} for any other CIFAR depth"
        )
    return cifar_resnet(name, n_blocks_per_stage=(depth - 2) // 6)


def policy_trunk(family: Family) -> Architecture:
    """Return the layout of the policy network for that family: ResNet-8 for CIFAR, ResNet-10 for ImageNet."""
    return architecture("resnet8" if family == "cifar" else "resnet10")


def policy_downscale(family: Family) -> int:
    """Return by what the paper's policy network scales images down: ImageNet's to 112 x 112 (section 4.1)."""
    return 1 if family == "cifar" else 2


def cifar_resnet(name: str, *, n_blocks_per_stage: int) -> Architecture:
    """Return a three-stage ResNet for 32 x 32 images, with the shortcuts of BlockDrop's authors."""
    return Architecture(
        name=name,
        family="cifar",
        block="basic",
        stages=(n_blocks_per_stage,) * 3,
        widths=(16, 32, 64),
        image_size=32,
        default_shortcut="average-pool",
    )


def imagenet_resnet(name: str, *, block: BlockKind, stages: tuple[int, ...]) -> Architecture:
    """Return a four-stage ResNet for 224 x 224 images."""
    return Architecture(
        name=name,
        family="imagenet",
        block=block,
        stages=stages,
        widths=(64, 128, 256, 512),
        image_size=224,
        default_shortcut="projection",
    )

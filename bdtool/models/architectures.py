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
_RESNETS: dict[str, tuple[BlockKind, tuple[int, ...]]] = {
    "resnet10": ("basic", (1, 1, 1, 1)),  # not in that table: the policy network of BlockDrop
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
# Their relatives, as torchvision names them: of which depth, and channels and groups of the first stage's 3x3
# convolutions. Xie et al., "Aggregated Residual Transformations", CVPR 2017; Zagoruyko and Komodakis, "Wide Residual
# Networks", BMVC 2016.
_WIDER: dict[str, tuple[str, int, int]] = {
    "resnext50_32x4d": ("resnet50", 128, 32),
    "resnext101_32x8d": ("resnet101", 256, 32),
    "resnext101_64x4d": ("resnet101", 256, 64),
    "wide_resnet50_2": ("resnet50", 128, 1),
    "wide_resnet101_2": ("resnet101", 128, 1),
}
_COMMON_CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The layout of a ResNet: everything about it but the number of classes.

    `stages` is the number of blocks per stage, `widths` the channels of each stage's 3x3 convolutions, `channels` of
    what it puts out, and `stem_width` of what the first one takes. A bottleneck's 3x3 convolution has `groups`.
    `image_size` is in pixels, square.
    """

    name: str
    family: Family
    block: BlockKind
    stages: tuple[int, ...]
    widths: tuple[int, ...]
    channels: tuple[int, ...]
    stem_width: int
    image_size: int
    default_shortcut: ShortcutKind
    groups: int = 1

    @property
    def n_blocks(self) -> int:
        return sum(self.stages)


def known_architectures() -> tuple[str, ...]:
    """Return the names worth listing; `architecture` also takes every other CIFAR depth 6n + 2."""
    return (*_COMMON_CIFAR, *_RESNETS, *_WIDER)


def architecture(name: str) -> Architecture:
    """Return the ResNet called `name`: ImageNet's, and `resnet{6n+2}` with n >= 1 for CIFAR.

    resnet50 and resnet152 are also of the form 6n + 2; these names mean the ImageNet networks, as everywhere.

    Raises:
        UsageError: there is no such ResNet.
    """
    if name in _RESNETS:
        block, stages = _RESNETS[name]
        return imagenet_resnet(name, block=block, stages=stages)
    if name in _WIDER:
        depth_of, width, groups = _WIDER[name]
        block, stages = _RESNETS[depth_of]
        return imagenet_resnet(name, block=block, stages=stages, width=width, groups=groups)
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
        channels=(16, 32, 64),
        stem_width=16,
        image_size=32,
        default_shortcut="average-pool",
    )


def imagenet_resnet(
    name: str, *, block: BlockKind, stages: tuple[int, ...], width: int = 64, groups: int = 1
) -> Architecture:
    """Return a four-stage ResNet for 224 x 224 images, with `width` channels in the first stage's 3x3 convolutions."""
    first = 256 if block == "bottleneck" else 64
    return Architecture(
        name=name,
        family="imagenet",
        block=block,
        stages=stages,
        widths=(width, 2 * width, 4 * width, 8 * width),
        channels=(first, 2 * first, 4 * first, 8 * first),
        stem_width=64,
        image_size=224,
        default_shortcut="projection",
        groups=groups,
    )

"""ResNets whose residual blocks can be dropped image by image.

Source: He et al., CVPR 2016; dropping as in Wu et al., "BlockDrop", CVPR 2018, section 3.1. Strides of bottlenecks sit
in the 3x3 convolution, as in torchvision ("v1.5") and in BlockDrop's code.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdtool.models.architectures import Architecture, ShortcutKind
from bdtool.models.shortcuts import make_shortcut


class CifarStem(nn.Module):
    """3x3 convolution, batch normalisation, ReLU: [N, 3, H, W] to [N, width, H / downscale, W / downscale]."""

    def __init__(self, width: int, *, downscale: int = 1) -> None:
        super().__init__()
        self.pool = _downscale(downscale)
        self.conv = _conv3x3(3, width)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(self.pool(images))))


class ImageNetStem(nn.Module):
    """7x7 convolution, batch normalisation, ReLU, max-pool: [N, 3, H, W] to [N, width, H / 4, W / 4].

    With a `downscale`, the pixels are averaged first, as in `CifarStem`.
    """

    def __init__(self, width: int, *, downscale: int = 1) -> None:
        super().__init__()
        self.pool = _downscale(downscale)
        self.conv = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, images: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.bn(self.conv(self.pool(images)))), kernel_size=3, stride=2, padding=1)


class ResidualBlock(nn.Module):
    """A kept block: `relu(shortcut(x) + residual(x))`, from [N, n_in, H, W] to [N, n_out, H / stride, W / stride]."""

    shortcut: nn.Module

    def residual(self, x: Tensor) -> Tensor:
        """Return F(x) of the paper: the branch, before the addition."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.residual(x))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; the first one carries the stride."""

    def __init__(self, n_in: int, width: int, *, stride: int, shortcut: ShortcutKind) -> None:
        super().__init__()
        self.conv1 = _conv3x3(n_in, width, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = make_shortcut(shortcut, n_in, width, stride=stride)

    def residual(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return y


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions; the middle one carries the stride and has `groups`, the last one widens."""

    def __init__(
        self, n_in: int, width: int, n_out: int, *, stride: int, shortcut: ShortcutKind, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride=stride, groups=groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, n_out, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(n_out)
        self.shortcut = make_shortcut(shortcut, n_in, n_out, stride=stride)

    def residual(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y


class GlobalAveragePool(nn.Module):
    """Mean over the pixels: [N, C, H, W] to [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class ResNet(nn.Module):
    """A ResNet as `stem`, a flat list of K `blocks`, and `head`.

    Args:
        architecture: its layout.
        shortcut: what replaces the identity where the shape changes.
        n_classes: columns of the logits; None leaves out the classifier, so that the head gives [N, n_features].
        downscale: the stem first averages `downscale` x `downscale` pixels into one.
    """

    def __init__(
        self, architecture: Architecture, *, shortcut: ShortcutKind, n_classes: int | None, downscale: int = 1
    ) -> None:
        super().__init__()
        stem = CifarStem if architecture.family == "cifar" else ImageNetStem
        self.stem = stem(architecture.stem_width, downscale=downscale)
        self.blocks = nn.ModuleList(_blocks(architecture, shortcut))
        self.n_features = architecture.channels[-1]
        layers: OrderedDict[str, nn.Module] = OrderedDict(pool=GlobalAveragePool())
        if n_classes is not None:
            layers["linear"] = nn.Linear(self.n_features, n_classes)
        self.head = nn.Sequential(layers)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return logits float32 [N, n_classes] of preprocessed images float32 [N, 3, H, W].

        A dropped block leaves `x` as it is, or at a shape change runs its shortcut alone, without a ReLU. Only the kept
        images of a block are computed. So in training mode its batch statistics are those of the images that use
        it, where the authors' code, which computes all and then masks, takes them over the whole batch.

        Args:
            images: as above.
            keep: bool [N, K], True runs block k on image n; None keeps every block.

        Raises:
            ValueError: `keep` is not bool, or not [N, K].
        """
        x: Tensor = self.stem(images)
        if keep is None:
            for block in self.blocks:
                x = block(x)
        else:
            x = self._run_kept_blocks(x, keep)
        logits: Tensor = self.head(x)
        return logits

    def _run_kept_blocks(self, x: Tensor, keep: Tensor) -> Tensor:
        expected = (len(x), len(self.blocks))
        if keep.dtype != torch.bool or tuple(keep.shape) != expected:
            raise ValueError(f"keep must be bool {expected}, images by blocks; got {keep.dtype} {tuple(keep.shape)}")
        for block, index in zip(self.blocks, kept_images(keep), strict=True):
            assert isinstance(block, ResidualBlock)
            x = run_kept_images(block, x, index)
        return x


def kept_images(keep: Tensor) -> list[Tensor]:
    """Return for each block the images that keep it, int64 [n_kept], ascending; `keep` is bool [N, K]."""
    n_kept: list[int] = keep.sum(dim=0).tolist()  # one transfer from the device instead of one for each block
    # column k begins with the images that keep block k, in their order: no transfer for each block's index either
    order = keep.to(torch.uint8).argsort(dim=0, descending=True, stable=True)
    return [order[:n, k] for k, n in enumerate(n_kept)]


def run_kept_images(block: ResidualBlock, x: Tensor, index: Tensor) -> Tensor:
    """Run `block` on some images of `x` [N, n_in, H, W] and its shortcut on the others; out of place, for autograd.

    Args:
        index: int64 [n_kept], ascending: the images that keep the block.
    """
    if len(index) == 0:
        return block.shortcut(x)  # type: ignore[no-any-return]
    if len(index) == len(x):
        return block(x)  # type: ignore[no-any-return]
    passed: Tensor = block.shortcut(x)
    chosen = take_images(x, index)
    around = chosen if passed is x else take_images(passed, index)
    return _put_images(passed, index, F.relu(around + block.residual(chosen)))


def take_images(x: Tensor, index: Tensor) -> Tensor:
    """Return the images `index`, int64 [n], of `x` [N, C, H, W], in the memory format of `x`."""
    if _is_channels_last(x):  # torch's own gather would give them back in NCHW
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)


def _put_images(x: Tensor, index: Tensor, images: Tensor) -> Tensor:
    if _is_channels_last(x):
        return x.permute(0, 2, 3, 1).index_copy(0, index, images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x.index_copy(0, index, images)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _blocks(architecture: Architecture, shortcut: ShortcutKind) -> list[ResidualBlock]:
    blocks: list[ResidualBlock] = []
    n_in = architecture.stem_width
    layout = zip(architecture.stages, architecture.widths, architecture.channels, strict=True)
    for stage, (n_blocks, width, n_out) in enumerate(layout):
        for i in range(n_blocks):
            stride = 2 if i == 0 and stage > 0 else 1
            if architecture.block == "basic":
                blocks.append(BasicBlock(n_in, width, stride=stride, shortcut=shortcut))
            else:
                groups = architecture.groups
                blocks.append(Bottleneck(n_in, width, n_out, stride=stride, shortcut=shortcut, groups=groups))
            n_in = n_out
    return blocks


def _downscale(factor: int) -> nn.Module:
    return nn.AvgPool2d(factor) if factor > 1 else nn.Identity()


def _conv3x3(n_in: int, n_out: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)

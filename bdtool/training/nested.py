"""Nested masks of a base network, and how hard it finds an image: what `bdtool.training.imitation` learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdtool.models.resnet import ResidualBlock, ResNet

_AT_ONCE = 64  # images; a ResNet-50 takes 8 MiB for each


@torch.no_grad()
def nested_masks(
    base: ResNet,
    images: Tensor,
    labels: Tensor,
    *,
    fewest: int,
    on_mask: Callable[[int], None] = lambda n_kept: None,
) -> Tensor:
    """Return masks that keep K, K - 1, ... `fewest` blocks, bool [K - fewest + 1, K], each a part of the one before.

    The block dropped next is the one without which the mean cross-entropy of the images is lowest.

    Args:
        base: in eval mode.
        images: preprocessed float32 [N, 3, H, W].
        labels: int64 [N].
        on_mask: called with the number of blocks of each mask that was found.
    """
    masks = [torch.ones(len(base.blocks), dtype=torch.bool)]
    while (n_kept := int(masks[-1].sum())) > fewest:
        smaller = masks[-1].clone()
        losses = losses_without_each(base, images, labels, masks[-1])
        smaller[masks[-1].nonzero()[losses.argmin()]] = False
        masks.append(smaller)
        on_mask(n_kept - 1)
    return torch.stack(masks)


@torch.no_grad()
def losses_without_each(base: ResNet, images: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy of the images along `mask` without each of its blocks in turn, float32 [n kept].

    The paths are alike up to the block that one of them lacks, and run together until there.
    """
    kept: list[bool] = mask.tolist()
    sums = torch.zeros(sum(kept), device=images.device)
    for x, y in _pieces(images, labels):
        losses = []
        x = base.stem(x)
        for k, block in enumerate(base.blocks):
            assert isinstance(block, ResidualBlock)
            if kept[k]:
                rest = _run_blocks(base, block.shortcut(x), kept, first=k + 1)
                losses.append(F.cross_entropy(base.head(rest).float(), y, reduction="sum"))
            x = block(x) if kept[k] else block.shortcut(x)
        sums += torch.stack(losses)
    return (sums / len(images)).cpu()


@torch.no_grad()
def path_losses(base: ResNet, images: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the cross-entropy of each image along one path, float32 [N]; arguments as for `nested_masks`."""
    kept: list[bool] = mask.tolist()
    return torch.cat(
        [
            F.cross_entropy(base.head(_run_blocks(base, base.stem(x), kept)).float(), y, reduction="none")
            for x, y in _pieces(images, labels)
        ]
    )


def blocks_by_rank(losses: np.ndarray, *, fewest: int, most: int) -> np.ndarray:
    """Return how many blocks to give each image, int64 [N]: the harder, the more.

    Two fifths of the images, the easiest, get `fewest`; two fifths, the hardest, `most`; the others the mean of both.

    Args:
        losses: of each image, [N].
    """
    rank = losses.argsort().argsort() / len(losses)
    return np.select([rank < 0.4, rank < 0.6], [fewest, (fewest + most) // 2], most)


def _run_blocks(base: ResNet, x: Tensor, kept: list[bool], *, first: int = 0) -> Tensor:
    """Run the kept blocks from block `first` on."""
    for k in range(first, len(kept)):
        block = base.blocks[k]
        assert isinstance(block, ResidualBlock)
        x = block(x) if kept[k] else block.shortcut(x)
    return x


def _pieces(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(images, _AT_ONCE), torch.split(labels, _AT_ONCE), strict=True)

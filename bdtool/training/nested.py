"""Nested masks of a base network, and how hard it finds an image: what `bdtool.training.imitation` learns from."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdtool.models.resnet import ResNet

_AT_ONCE = 64  # images; a ResNet-50 takes 8 MiB for each


@torch.no_grad()
def nested_masks(base: ResNet, images: Tensor, labels: Tensor, *, fewest: int) -> Tensor:
    """Return masks that keep K, K - 1, ... `fewest` blocks, bool [K - fewest + 1, K], each a part of the one before.

    The block dropped next is the one without which the mean cross-entropy of the images is lowest.

    Args:
        base: in eval mode.
        images: preprocessed float32 [N, 3, H, W].
        labels: int64 [N].
    """
    masks = [torch.ones(len(base.blocks), dtype=torch.bool)]
    for _ in range(len(base.blocks) - fewest):
        candidates = [_without(masks[-1], k) for k in masks[-1].nonzero().flatten().tolist()]
        losses = [float(path_losses(base, images, labels, mask).mean()) for mask in candidates]
        masks.append(candidates[losses.index(min(losses))])
    return torch.stack(masks)


@torch.no_grad()
def path_losses(base: ResNet, images: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the cross-entropy of each image along one path, float32 [N]; arguments as for `nested_masks`."""
    mask = mask.to(images.device)
    pieces = zip(torch.split(images, _AT_ONCE), torch.split(labels, _AT_ONCE), strict=True)
    return torch.cat(
        [F.cross_entropy(base(x, mask.expand(len(x), -1)).float(), y, reduction="none") for x, y in pieces]
    )


def blocks_by_rank(losses: np.ndarray, *, fewest: int, most: int) -> np.ndarray:
    """Return how many blocks to give each image, int64 [N]: the harder, the more.

    Two fifths of the images, the easiest, get `fewest`; two fifths, the hardest, `most`; the others the mean of both.

    Args:
        losses: of each image, [N].
    """
    rank = losses.argsort().argsort() / len(losses)
    return np.select([rank < 0.4, rank < 0.6], [fewest, (fewest + most) // 2], most)


def _without(mask: Tensor, block: int) -> Tensor:
    smaller = mask.clone()
    smaller[block] = False
    return smaller

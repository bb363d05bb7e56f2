"""Nested masks of a base network, and how hard it finds an image: what `bdtool.training.imitation` learns from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdtool.models.resnet import ResidualBlock, ResNet

_AT_ONCE = 64  # images; a ResNet-50 takes 8 MiB for each


class MaskSearch:
    """The search for nested masks, a path of some images at a time: between two paths it can be saved.

    The block dropped next is the one without which the mean cross-entropy of the images is lowest.

    Args:
        base: in eval mode.
        images: preprocessed float32 [N, 3, H, W].
        labels: int64 [N].
        fewest: blocks of the smallest mask.
    """

    name = "masks"

    def __init__(self, base: ResNet, images: Tensor, labels: Tensor, *, fewest: int) -> None:
        self._base, self._images, self._labels, self._fewest = base, images, labels, fewest
        self._masks = [torch.ones(len(base.blocks), dtype=torch.bool)]
        self._sums, self._n_seen = self._no_sums(), 0
        self._losses: list[Tensor] = []  # of the piece of the images at work, without the first kept blocks
        self._following: Iterator[Tensor] | None = None  # those without the others, as they are computed

    @property
    def masks(self) -> Tensor:
        """Those found so far, bool [n, K]: they keep K, K - 1, ... blocks, each a part of the one before."""
        return torch.stack(self._masks)

    @property
    def is_over(self) -> bool:
        return self._n_kept <= self._fewest

    @property
    def share(self) -> float:
        return (len(self._masks) - 1 + self._share_of_next) / self._n_masks

    @property
    def where(self) -> str:
        return f"{len(self._masks) - 1} of {self._n_masks} masks and {self._share_of_next:.1%} of the next"

    def advance(self) -> None:
        """Run a piece of the images without one more block; behind the last block and piece a mask is found."""
        piece = slice(self._n_seen, self._n_seen + _AT_ONCE)
        if self._following is None:
            images, labels, n_known = self._images[piece], self._labels[piece], len(self._losses)
            self._following = _sums_without_each(self._base, images, labels, self._masks[-1], first=n_known)
        self._losses.append(next(self._following))
        if len(self._losses) == self._n_kept:
            self._sums += torch.stack(self._losses)
            self._n_seen = min(piece.stop, len(self._images))
            self._losses, self._following = [], None
        if self._n_seen == len(self._images):
            smaller = self._masks[-1].clone()
            smaller[smaller.nonzero()[self._sums.argmin().cpu()]] = False
            self._masks.append(smaller)
            self._sums, self._n_seen = self._no_sums(), 0

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks, "sums": self._sums, "n_seen": self._n_seen, "losses": self._losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self._images.device
        self._masks = list(state["masks"])
        self._sums, self._n_seen = state["sums"].to(device), state["n_seen"]
        self._losses, self._following = [loss.to(device) for loss in state["losses"]], None

    @property
    def _n_masks(self) -> int:
        """How many are to be found, besides that of all blocks."""
        return len(self._base.blocks) - self._fewest

    @property
    def _n_kept(self) -> int:
        return int(self._masks[-1].sum())

    @property
    def _share_of_next(self) -> float:
        n_piece = min(_AT_ONCE, len(self._images) - self._n_seen)
        return (self._n_seen + n_piece * len(self._losses) / self._n_kept) / len(self._images)

    def _no_sums(self) -> Tensor:
        """Return the sums before the first piece, of the losses without each kept block."""
        return torch.zeros(self._n_kept, device=self._images.device)


def losses_without_each(base: ResNet, images: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy of the images along `mask` without each of its blocks in turn, float32 [n kept]."""
    sums = torch.zeros(int(mask.sum()), device=images.device)
    for x, y in _pieces(images, labels):
        sums += torch.stack(list(_sums_without_each(base, x, y, mask)))
    return (sums / len(images)).cpu()


@torch.no_grad()
def _sums_without_each(
    base: ResNet, images: Tensor, labels: Tensor, mask: Tensor, *, first: int = 0
) -> Iterator[Tensor]:
    """Yield the sum of the images' losses, a scalar, without each kept block in turn, from the kept block `first` on.

    The paths are alike up to the block that one of them lacks, and run together until there.
    """
    kept: list[bool] = mask.tolist()
    x = base.stem(images)
    for k, block in enumerate(base.blocks):
        assert isinstance(block, ResidualBlock)
        if kept[k] and sum(kept[:k]) >= first:
            rest = _run_blocks(base, block.shortcut(x), kept, first=k + 1)
            yield F.cross_entropy(base.head(rest).float(), labels, reduction="sum")
        x = block(x) if kept[k] else block.shortcut(x)


@torch.no_grad()
def path_losses(base: ResNet, images: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the cross-entropy of each image along one path, float32 [N]; arguments as for `MaskSearch`."""
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

"""Forward passes without gradients: two keep matrices over one batch, with what they share computed once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bdtool.models.resnet import ResidualBlock, ResNet, kept_images, run_kept_images, take_images


def frozen_copy(base: ResNet, *, dtype: torch.dtype) -> ResNet:
    """Return a copy for inference alone: batch norms folded into their convolutions, channels last, weights in `dtype`.

    Reads the running statistics, whatever mode `base` is in.
    """
    frozen = copy.deepcopy(base).eval().requires_grad_(False)
    for module in list(frozen.modules()):
        _fold_batch_norms(module)
    return frozen.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@torch.no_grad()
def paired_logits(base: ResNet, images: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of both keep matrices, float32 [N, n_classes] each.

    An image runs once up to the first block where its two rows differ; there its activation is copied, and both go on
    in one batch. Equal rows cost one pass, and blocks that a curriculum still keeps on run once.

    Args:
        base: in eval mode, as with statistics of a batch an image's answer would depend on the other rows.
        images: preprocessed float32 [N, 3, H, W].
        first: bool [N, K], True = kept.
        second: as `first`.
    """
    x: Tensor = base.stem(images.to(next(base.parameters()).dtype))
    fork_at = _first_difference(first, second)
    forks: list[list[int]] = [[] for _ in base.blocks]  # which images part ways at block k
    for image, k in enumerate(fork_at.tolist()):
        if k < len(forks):
            forks[k].append(image)
    source = torch.tensor([image for group in forks for image in group], dtype=torch.int64, device=x.device)
    # before it parts ways a row of the second matrix is not there, and keeps nothing
    is_apart = torch.arange(len(forks), device=x.device) >= fork_at[source][:, None]
    keep = torch.cat([first, second[source] & is_apart])  # rows N and up: the second matrix, in the order of forking
    n_rows = len(x)
    for k, (block, index) in enumerate(zip(base.blocks, kept_images(keep), strict=True)):
        assert isinstance(block, ResidualBlock)
        if forks[k]:
            n_old, n_rows = n_rows, n_rows + len(forks[k])
            x = torch.cat([x, take_images(x, source[n_old - len(images) : n_rows - len(images)])])
        x = run_kept_images(block, x, index)
    logits = base.head(x).float()
    second_logits = logits[: len(images)].clone()
    second_logits[source] = logits[len(images) :]
    return logits[: len(images)], second_logits


def _first_difference(first: Tensor, second: Tensor) -> Tensor:
    """Return, int64 [N], the first block where the rows differ, or K where they are equal."""
    differs = first ^ second
    position = differs.to(torch.uint8).argmax(dim=1)
    return torch.where(differs.any(dim=1), position, torch.full_like(position, first.shape[1]))


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold every `bn*` of a module into the `conv*` of the same number: the naming of `bdtool.models.resnet`."""
    for name, layer in list(module.named_children()):
        if isinstance(layer, nn.BatchNorm2d):
            conv = getattr(module, name.replace("bn", "conv"))
            setattr(module, name.replace("bn", "conv"), fuse_conv_bn_eval(conv, layer))
            setattr(module, name, nn.Identity())

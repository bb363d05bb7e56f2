"""A policy network that learns, from the base's own losses, which images are hard, and gives those more blocks.

Not in the paper, whose policy gradient takes thousands of epochs to find masks that differ by image. Here the trunk of
the policy network is a trained classifier that stays as it is; what is learned is the part behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdtool.data.batches import ImageBatch, ImageSource
from bdtool.models.model import BlockDropModel
from bdtool.models.policy import PolicyNetwork
from bdtool.runtime.preprocess import Preprocessor
from bdtool.training.nested import blocks_by_rank, nested_masks, path_losses
from bdtool.training.options import ImitateOptions
from bdtool.training.passes import frozen_copy
from bdtool.training.trainer import schedule_factor

_BATCH = 250
_LEAST_SPREAD = 1e-3  # of a feature, as a share of the mean spread
OnProgress = Callable[[float, str], None]  # the share that is done, and a line of text


def imitate_losses(
    model: BlockDropModel, images: ImageSource, options: ImitateOptions, *, on_progress: OnProgress
) -> Tensor:
    """Train the layers of the policy network behind its trunk, in place, on the model's device.

    Returns the masks that it chooses from, as `nested_masks` does.

    Args:
        images: labelled; each is taken as it is deployed, and flipped.

    Raises:
        UsageError: `options` ask for more blocks than the model has.
    """
    assert model.policy is not None
    fewest, most = options.blocks_of(model.n_blocks)
    model.eval()
    base = frozen_copy(model.base, dtype=torch.float32)
    on_progress(0.0, "masks")
    judges = images.drawn(options.judges, seed=options.seed)
    n_masks = max(1, model.n_blocks - fewest)
    masks = nested_masks(
        base,
        *_tensors(model, judges.take(judges.n_images)),
        fewest=fewest,
        on_mask=lambda n_kept: on_progress(0.2 * (model.n_blocks - n_kept) / n_masks, "masks"),
    )
    losses, features = [], []
    for number, batch in enumerate(images.batches(_BATCH)):
        on_progress(0.2 + 0.6 * number * _BATCH / images.n_images, "losses and features")
        pixels, labels = _tensors(model, batch)
        losses.append(path_losses(base, pixels, labels, masks[-1]))
        features.append(_features(model.policy, pixels))
    n_blocks = blocks_by_rank(torch.cat(losses).cpu().numpy(), fewest=fewest, most=most)
    targets = masks[model.n_blocks - torch.from_numpy(n_blocks)].float()
    on_progress(0.8, "policy network")
    fit_head(
        model.policy,
        torch.cat(features, dim=1),
        targets.to(features[0].device),
        options,
        on_share=lambda share: on_progress(0.8 + 0.2 * share, "policy network"),
    )
    return masks


def fit_head(
    policy: PolicyNetwork,
    features: Tensor,
    targets: Tensor,
    options: ImitateOptions,
    *,
    on_share: Callable[[float], None] = lambda share: None,
) -> None:
    """Fit the layers behind the trunk, in place, by binary cross-entropy.

    Args:
        features: float32 [2, N, n_features], of the images and of the flipped images.
        targets: keep bits, float32 [N, K].
        on_share: called with the share of the steps that is done.
    """
    mean, std = features.mean(dim=(0, 1)), features.std(dim=(0, 1))
    # a feature that hardly varies on these images says nothing; scaled up, it would decide on others
    std[std <= _LEAST_SPREAD * std.mean()] = torch.inf
    features = (features - mean) / std  # as Adam's steps are alike for all weights; undone in `_unscale`
    first = policy.logit if policy.hidden is None else policy.hidden
    head = nn.Sequential(first) if first is policy.logit else nn.Sequential(first, nn.ReLU(), policy.logit)
    optimizer = torch.optim.Adam(head.parameters(), lr=options.lr)
    n_steps = max(1, round(options.epochs * len(targets) / options.batch))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_factor(options.schedule, n_steps))
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(n_steps):
        image = torch.randint(len(targets), (options.batch,), generator=generator)
        flipped = torch.randint(2, (options.batch,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(head(features[flipped, image]), targets[image])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        on_share((step + 1) / n_steps)
    _unscale(first, mean, std)


@torch.no_grad()
def _unscale(layer: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Let a layer that learned on (features - mean) / std take the features themselves."""
    layer.weight.div_(std)
    layer.bias.sub_(layer.weight @ mean)


@torch.no_grad()
def _features(policy: PolicyNetwork, pixels: Tensor) -> Tensor:
    """Return what the trunk makes of the images and of the flipped images, float32 [2, N, n_features]."""
    return torch.stack([policy.features(pixels), policy.features(pixels.flip(3))])


def _tensors(model: BlockDropModel, batch: ImageBatch) -> tuple[Tensor, Tensor]:
    assert batch.labels is not None
    device = next(model.parameters()).device
    pixels = torch.from_numpy(Preprocessor(model.spec.preprocessing)(batch.images))
    return pixels.to(device), torch.from_numpy(batch.labels.astype(np.int64)).to(device)

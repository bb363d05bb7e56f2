"""A policy network that keeps a wanted number of blocks: what `--gamma` only steers, met exactly."""

from __future__ import annotations

import math

import numpy as np
import torch

from bdtool.data.batches import ImageSource
from bdtool.errors import UsageError
from bdtool.models.model import BlockDropModel
from bdtool.torch_classifier import TorchClassifier

_LEAST = 1e-7  # a probability whose logit is finite
_IMAGES = 5000  # a mean of 15 blocks with a spread of 2 over so many images is known to 0.03


def shift_policy(model: BlockDropModel, images: ImageSource, blocks: float) -> None:
    """Shift every logit of the policy network by the same amount, so that it keeps `blocks` blocks on average.

    Which images keep more than others, and which blocks go first, stays as it was learned.

    Args:
        images: 5,000 drawn from them are counted, as they are, without augmentation.

    Raises:
        UsageError: the model has no policy network, or not so many blocks.
    """
    if model.policy is None:
        raise UsageError(f"blocks {blocks:g}: only a policy network can be shifted; use it with --policy learned")
    if not 0 < blocks < model.n_blocks:
        raise UsageError(f"blocks {blocks:g}: expected more than 0 and less than the model's {model.n_blocks}")
    classifier = TorchClassifier(model)
    batches = images.drawn(_IMAGES, seed=0).batches(500)
    probability = np.concatenate([classifier.keep_probability(batch.images) for batch in batches]).astype(np.float64)
    n_kept = min(max(1, round(blocks * len(probability))), probability.size - 1)
    lowest_kept, highest_dropped = -np.partition(-probability, (n_kept - 1, n_kept), axis=None)[n_kept - 1 : n_kept + 1]
    threshold = np.clip((lowest_kept + highest_dropped) / 2, _LEAST, 1 - _LEAST)  # a saturated policy has 0 and 1
    with torch.no_grad():
        model.policy.logit.bias.sub_(math.log(threshold / (1 - threshold)))

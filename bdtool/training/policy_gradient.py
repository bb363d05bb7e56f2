"""The policy gradient of BlockDrop: Wu, Nagarajan et al., CVPR 2018, section 3.3.

Symbols: s [N, K] is P(keep) from the policy network, u [N, K] the keep bits (1 = kept), K the number of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bound_probability(probability: Tensor, alpha: float) -> Tensor:
    """Return s' = alpha s + (1 - alpha)(1 - s), in [1 - alpha, alpha]: no block is ever certain while learning.

    Source: section 3.3, "we introduce a parameter alpha to bound the distribution s".
    """
    return alpha * probability + (1 - alpha) * (1 - probability)


def reward(keep: Tensor, correct: Tensor, gamma: float) -> Tensor:
    """Return the reward of each image, float32 [N]: 1 - (|u| / K)^2 where it was classified correctly, else -gamma.

    Source: equation 3.

    Args:
        keep: bool [N, K].
        correct: bool [N].
        gamma: penalty of a wrong prediction, at least 0.
    """
    block_use = keep.float().mean(dim=1)
    return torch.where(correct, 1 - block_use**2, torch.full_like(block_use, -gamma))


def policy_loss(bounded: Tensor, sampled: Tensor, advantage: Tensor, learned: Tensor) -> Tensor:
    """Return a scalar whose gradient is the policy gradient with a self-critical baseline: equations 5 to 7.

    The loss is -mean over images of A * sum over learned blocks of log P(u_k), where A = R(sampled) - R(greedy).

    Args:
        bounded: float [N, K], the probabilities that `sampled` was drawn with.
        sampled: bool [N, K].
        advantage: float [N], without gradient.
        learned: bool [K]; blocks that the curriculum still keeps on give no gradient.
    """
    log_likelihood = torch.log(torch.where(sampled, bounded, 1 - bounded))
    return -(advantage[:, None] * log_likelihood * learned).sum(dim=1).mean()


def entropy(bounded: Tensor, learned: Tensor) -> Tensor:
    """Return the mean over images of the summed entropy, in nats, of the learned blocks' Bernoulli distributions.

    Source: the authors' code adds an entropy bonus of weight 0.1, with the term of a kept block alone.
    """
    terms = -bounded * torch.log(bounded) - (1 - bounded) * torch.log(1 - bounded)
    return torch.where(learned, terms, torch.zeros_like(terms)).sum(dim=1).mean()


def learned_blocks(n_blocks: int, n_learned: int, *, device: torch.device | None = None) -> Tensor:
    """Return bool [K]: True for the last `n_learned` blocks, which a curriculum step learns (section 3.3)."""
    return torch.arange(n_blocks, device=device) >= n_blocks - n_learned

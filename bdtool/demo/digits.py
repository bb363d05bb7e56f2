"""A small ResNet for scikit-learn's handwritten digits, trained so that it tolerates dropped blocks.

The digits: 1,797 real images of 8 x 8 pixels in 17 greys, from the UCI repository ("Optical Recognition of Handwritten
Digits", Alpaydin and Kaynak, 1998). Each is scaled to 32 x 32 RGB, the input of a CIFAR ResNet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bdtool.errors import DataError
from bdtool.models.model import BlockDropModel, ModelSpec, build_model
from bdtool.runtime.preprocess import preprocess
from bdtool.specs import Preprocessing

ARCH = "resnet20"
N_TEST = 360  # the last ones: written by other people than the first
EPOCHS = 12
BATCH = 48
_MAX_SHIFT = 3  # pixels of 32, the augmentation
_KEEP_LOW = 0.4  # each batch keeps blocks with a probability between this and 1


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits() -> Digits:
    """Return the digits that scikit-learn ships.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as exc:
        raise DataError("the demo's digits come with scikit-learn; add it with: pip install 'bdtool[demo]'") from exc
    digits = datasets.load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(np.kron(grey, np.ones((1, 4, 4), dtype=np.uint8))[..., None], 3, axis=-1)
    labels = digits.target.astype(np.int64)
    return Digits(
        train_images=images[:-N_TEST],
        train_labels=labels[:-N_TEST],
        test_images=images[-N_TEST:],
        test_labels=labels[-N_TEST:],
    )


def train_digits(
    digits: Digits,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> BlockDropModel:
    """Return a ResNet-20 trained on the digits with stochastic depth, in eval mode.

    Blocks are dropped at random while training (Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016; here
    with one keep probability for each batch and no rescaling), because the demo has no policy network: its policies
    are heuristics, and a network that never saw a dropped block does poorly under them.
    """
    torch.manual_seed(seed)
    model = build_model(_spec(seed, epochs), seed=seed).train()
    images = torch.from_numpy(preprocess(digits.train_images, model.spec.preprocessing))
    labels = torch.from_numpy(digits.train_labels)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(images))[: steps // epochs * BATCH].view(-1, BATCH):
            loss = nn.functional.cross_entropy(
                model(_shift(images[rows]), _random_keep(model, len(rows))), labels[rows]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        on_epoch(epoch, float(np.mean(losses)))
    return model.eval()


def _spec(seed: int, epochs: int) -> ModelSpec:
    return ModelSpec(
        arch=ARCH,
        n_classes=10,
        labels=tuple("0123456789"),
        preprocessing=Preprocessing(height=32, width=32, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35)),
        shortcut="average-pool",
        has_policy=False,
        provenance={"created_by": "bdtool demo", "data": "scikit-learn digits", "seed": seed, "epochs": epochs},
    )


def _random_keep(model: BlockDropModel, n_images: int) -> Tensor:
    probability = _KEEP_LOW + (1 - _KEEP_LOW) * torch.rand(())
    return torch.rand(n_images, model.n_blocks) < probability


def _shift(images: Tensor) -> Tensor:
    down, right = torch.randint(-_MAX_SHIFT, _MAX_SHIFT + 1, (2,)).tolist()
    return torch.roll(images, (down, right), dims=(2, 3))

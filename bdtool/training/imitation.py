"""A policy network that learns, from the base's own losses, which images are hard, and gives those more blocks.

Not in the paper, whose policy gradient takes thousands of epochs to find masks that differ by image. Here the trunk of
the policy network is a trained classifier that stays as it is; what is learned is the part behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bdtool.data.batches import ImageSource
from bdtool.models.model import BlockDropModel
from bdtool.models.resnet import ResNet
from bdtool.runtime.preprocess import Preprocessor
from bdtool.training.nested import MaskSearch, blocks_by_rank, path_losses
from bdtool.training.options import ImitateOptions
from bdtool.training.passes import frozen_copy
from bdtool.training.pieces import Part
from bdtool.training.policy_head import HeadFit

_BATCH = 250
_SHARES = (0.0, 0.2, 0.8, 1.0)  # of the whole, where the parts begin and end


class Imitation:
    """Trains the layers of the policy network behind its trunk, in place, on the model's device.

    Its parts follow one another, each from what those before it found: nested masks, the losses and features of all
    images, the layers.

    Args:
        images: labelled; each is taken as it is deployed, and flipped.
        goes_on: the layers were trained before, and begin from what they say.

    Raises:
        UsageError: `options` ask for more blocks than the model has.
    """

    def __init__(
        self, model: BlockDropModel, images: ImageSource, options: ImitateOptions, *, goes_on: bool = False
    ) -> None:
        self._model, self._images, self._options, self._goes_on = model.eval(), images, options, goes_on
        self._fewest, self._most = options.blocks_of(model.n_blocks)
        self._base = frozen_copy(model.base, dtype=torch.float32)
        judges = images.drawn(options.judges, seed=options.seed)
        pixels, labels = _tensors(model, judges, range(judges.n_images))
        self._search = MaskSearch(self._base, pixels, labels, fewest=self._fewest)
        self._parts: list[Part] = [self._search]
        self._begin_next()

    @property
    def masks(self) -> Tensor:
        """The masks that the policy network chooses from, as of `MaskSearch`."""
        return self._search.masks

    @property
    def is_over(self) -> bool:
        return self._parts[-1].is_over  # the last of all, as any other has begun the next

    @property
    def name(self) -> str:
        return self._parts[-1].name

    @property
    def share(self) -> float:
        first, last = _SHARES[len(self._parts) - 1 : len(self._parts) + 1]
        return first + (last - first) * self._parts[-1].share

    @property
    def where(self) -> str:
        return self._parts[-1].where

    def advance(self) -> None:
        self._parts[-1].advance()
        self._begin_next()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._parts = [self._search]
        for number, saved in enumerate(state["parts"]):
            self._begin_next()
            self._parts[number].load_state_dict(saved)

    def _begin_next(self) -> None:
        if not self._parts[-1].is_over or len(self._parts) == len(_SHARES) - 1:
            return
        if len(self._parts) == 1:
            self._survey = _Survey(self._model, self._base, self._images, self.masks[-1])
            self._parts.append(self._survey)
        else:
            self._parts.append(self._head_fit())

    def _head_fit(self) -> HeadFit:
        assert self._model.policy is not None
        losses, features = self._survey.losses, self._survey.features
        n_blocks = blocks_by_rank(losses.cpu().numpy(), fewest=self._fewest, most=self._most)
        targets = self.masks[self._model.n_blocks - torch.from_numpy(n_blocks)].float()
        targets = targets.to(features.device)
        return HeadFit(self._model.policy, features, targets, self._options, goes_on=self._goes_on)


class _Survey:
    """What base and trunk make of every image: its loss along one path, and its features, as it is and flipped."""

    name = "losses and features"

    def __init__(self, model: BlockDropModel, base: ResNet, images: ImageSource, mask: Tensor) -> None:
        assert model.policy is not None
        self._model, self._policy, self._base, self._images, self._mask = model, model.policy, base, images, mask
        device = next(model.parameters()).device
        self.losses = torch.empty(images.n_images, device=device)
        self.features = torch.empty(2, images.n_images, model.policy.trunk.n_features, device=device)
        self._n_read = 0

    @property
    def is_over(self) -> bool:
        return self._n_read == self._images.n_images

    @property
    def share(self) -> float:
        return self._n_read / self._images.n_images

    @property
    def where(self) -> str:
        return f"losses and features of {self._n_read} of {self._images.n_images} images"

    @torch.no_grad()
    def advance(self) -> None:
        index = range(self._n_read, min(self._n_read + _BATCH, self._images.n_images))
        pixels, labels = _tensors(self._model, self._images, index)
        read = slice(index.start, index.stop)
        self.losses[read] = path_losses(self._base, pixels, labels, self._mask)
        self.features[0, read] = self._policy.features(pixels)
        self.features[1, read] = self._policy.features(pixels.flip(3))
        self._n_read = index.stop

    def state_dict(self) -> dict[str, Any]:
        # clones: of a view, torch.save writes the whole
        return {"losses": self.losses[: self._n_read].clone(), "features": self.features[:, : self._n_read].clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._n_read = len(state["losses"])
        self.losses[: self._n_read] = state["losses"]
        self.features[:, : self._n_read] = state["features"]


def _tensors(model: BlockDropModel, images: ImageSource, index: range) -> tuple[Tensor, Tensor]:
    """Return these images, preprocessed float32 [n, 3, H, W], and their labels int64 [n], on the model's device."""
    assert images.labels is not None
    device = next(model.parameters()).device
    pixels = torch.from_numpy(Preprocessor(model.spec.preprocessing)(images.images_at(index)))
    labels = torch.from_numpy(images.labels[index.start : index.stop])
    return pixels.to(device), labels.to(device)

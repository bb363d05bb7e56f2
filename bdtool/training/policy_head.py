"""The layers of a policy network behind its trunk, fitted to keep bits that are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdtool.models.policy import PolicyNetwork
from bdtool.training.options import ImitateOptions
from bdtool.training.trainer import schedule_factor

_LEAST_SPREAD = 1e-3  # of a feature, as a share of the mean spread


class HeadFit:
    """Fits the layers behind the trunk, in place, by binary cross-entropy and Adam, a step at a time.

    Until the last step they take features scaled to a spread of 1; that step lets them take the features themselves.

    Args:
        features: float32 [2, N, n_features], of the images and of the flipped images.
        targets: keep bits, float32 [N, K].
        goes_on: begin from what the layers say of the features themselves, as they were trained before.
    """

    name = "policy network"

    def __init__(
        self,
        policy: PolicyNetwork,
        features: Tensor,
        targets: Tensor,
        options: ImitateOptions,
        *,
        goes_on: bool = False,
    ) -> None:
        self._mean, self._std = features.mean(dim=(0, 1)), features.std(dim=(0, 1))
        # a feature that hardly varies on these images says nothing; scaled up, it would decide on others
        self._std[self._std <= _LEAST_SPREAD * self._std.mean()] = torch.inf
        self._features = (features - self._mean) / self._std  # as Adam's steps are alike for all weights
        self._targets, self._batch = targets, options.batch
        self._first = policy.logit if policy.hidden is None else policy.hidden
        if goes_on:
            _scale(self._first, self._mean, self._std)
        behind = [] if self._first is policy.logit else [nn.ReLU(), policy.logit]
        self._head = nn.Sequential(self._first, *behind)
        self._n_steps = options.n_fit_steps(len(targets))
        self._step = 0
        self._optimizer = torch.optim.Adam(self._head.parameters(), lr=options.lr)
        factor = schedule_factor(options.schedule, self._n_steps)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factor)
        self._generator = torch.Generator().manual_seed(options.seed)

    @property
    def is_over(self) -> bool:
        return self._step == self._n_steps

    @property
    def share(self) -> float:
        return self._step / self._n_steps

    @property
    def where(self) -> str:
        return f"step {self._step} of {self._n_steps} of the policy network"

    def advance(self) -> None:
        image = torch.randint(len(self._targets), (self._batch,), generator=self._generator)
        flipped = torch.randint(2, (self._batch,), generator=self._generator)
        logits = self._head(self._features[flipped, image])
        loss = F.binary_cross_entropy_with_logits(logits, self._targets[image])
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._scheduler.step()
        self._step += 1
        if self.is_over:
            _unscale(self._first, self._mean, self._std)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "head": self._head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        self._head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._generator.set_state(state["generator"])


@torch.no_grad()
def _scale(layer: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Let a layer that takes features take (features - mean) / std, with the same outcome."""
    layer.bias.add_(layer.weight @ mean)
    layer.weight.mul_(std.where(std.isfinite(), 0))


@torch.no_grad()
def _unscale(layer: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Let a layer that learned on (features - mean) / std take the features themselves."""
    layer.weight.div_(std)
    layer.bias.sub_(layer.weight @ mean)

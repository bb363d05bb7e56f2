"""A ResNet and, where there is one, the policy network that chooses its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bdtool.errors import PolicyError
from bdtool.models.model_spec import ModelSpec
from bdtool.models.policy import PolicyNetwork
from bdtool.models.resnet import ResNet

__all__ = ["BlockDropModel", "ModelSpec", "build_model"]


class BlockDropModel(nn.Module):
    """The network to run (`base`), the one that decides (`policy`, or None), and what both are (`spec`)."""

    policy: PolicyNetwork | None

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        arch = spec.architecture
        self.spec = spec
        self.base = ResNet(arch, shortcut=spec.shortcut, n_classes=spec.n_classes, downscale=spec.downscale)
        self.policy = None
        if spec.has_policy:
            self.policy = PolicyNetwork(
                arch.family,
                n_blocks=arch.n_blocks,
                n_hidden=spec.policy_hidden,
                downscale=spec.policy_downscale,
            )

    @property
    def n_blocks(self) -> int:
        return len(self.base.blocks)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return logits float32 [N, n_classes]; arguments and errors as in `ResNet.forward`."""
        logits: Tensor = self.base(images, keep)
        return logits

    def keep_probability(self, images: Tensor) -> Tensor:
        """Return s_k = P(keep block k), float32 [N, K], of preprocessed images float32 [N, 3, H, W].

        Raises:
            PolicyError: the model has no policy network.
        """
        if self.policy is None:
            raise PolicyError(f"this {self.spec.arch} has no policy network; give a policy such as 'all', or train one")
        probability: Tensor = self.policy(images)
        return probability


def build_model(spec: ModelSpec, *, seed: int | None = None) -> BlockDropModel:
    """Return a model with fresh random weights, in eval mode, on the CPU.

    Convolutions start from a normal distribution of variance 2 / (kernel area x output channels): He et al., "Delving
    Deep into Rectifiers", ICCV 2015, equation 14.

    Args:
        spec: what to build.
        seed: makes the weights reproducible and leaves torch's global generators untouched; None draws from them.
    """
    with _seeded(seed):
        model = BlockDropModel(spec)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.eval()


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs' generators, which fork_rng(devices=[]) does not give back
        torch.default_generator.manual_seed(seed)
        yield

"""The policy network: one small ResNet that looks at the image once and says which blocks to keep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdtool.models.architectures import Architecture, Family, architecture
from bdtool.models.resnet import ResNet


def policy_trunk(family: Family) -> Architecture:
    """Return the layout of the policy network for that family: ResNet-8 for CIFAR, ResNet-10 for ImageNet."""
    return architecture("resnet8" if family == "cifar" else "resnet10")


class PolicyNetwork(nn.Module):
    """Keep probabilities of all K blocks from the image alone.

    Source: Wu et al., CVPR 2018, section 3.2 and equations 1 and 2. The authors' code has a value head beside `logit`;
    it is only a baseline that lowers the variance of their policy gradient, no answer depends on it, so it is
    left out here.
    """

    def __init__(self, family: Family, *, n_blocks: int) -> None:
        super().__init__()
        trunk = policy_trunk(family)
        self.halve_image = family == "imagenet"
        self.trunk = ResNet(trunk, shortcut=trunk.default_shortcut, n_classes=None)
        self.logit = nn.Linear(self.trunk.n_features, n_blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Return keep probabilities float32 [N, K] in (0, 1) of preprocessed images float32 [N, 3, H, W]."""
        if self.halve_image:  # 112 x 112 is enough to decide, at a quarter of the cost (section 4.1)
            images = F.avg_pool2d(images, 2)
        return torch.sigmoid(self.logit(self.trunk(images)))

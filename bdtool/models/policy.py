"""The policy network: one small ResNet that looks at the image once and says which blocks to keep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdtool.models.architectures import Family, policy_trunk
from bdtool.models.resnet import ResNet


class PolicyNetwork(nn.Module):
    """Keep probabilities of all K blocks from the image alone.

    Source: Wu et al., CVPR 2018, section 3.2 and equations 1 and 2. The authors' code has a value head beside `logit`;
    it is only a baseline that lowers the variance of their policy gradient, no answer depends on it, so it is
    left out here.

    Args:
        n_hidden: width of a fully connected layer with ReLU between trunk and `logit`; 0, as in the paper, has none. Of
            pooled features, a linear layer can say which class an image looks like; how hard it is takes a hidden one.
        downscale: of the image, before the first convolution: see `ResNet`.
    """

    def __init__(self, family: Family, *, n_blocks: int, n_hidden: int = 0, downscale: int = 1) -> None:
        super().__init__()
        trunk = policy_trunk(family)
        self.trunk = ResNet(trunk, shortcut=trunk.default_shortcut, n_classes=None, downscale=downscale)
        self.hidden = nn.Linear(self.trunk.n_features, n_hidden) if n_hidden else None
        self.logit = nn.Linear(n_hidden or self.trunk.n_features, n_blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Return keep probabilities float32 [N, K] in (0, 1) of preprocessed images float32 [N, 3, H, W]."""
        features = self.features(images)
        if self.hidden is not None:
            features = F.relu(self.hidden(features))
        # under autocast the logit is bfloat16, in which every P(keep) above 0.998 is 1, and has no gradient
        return torch.sigmoid(self.logit(features).float())

    def features(self, images: Tensor) -> Tensor:
        """Return what the trunk makes of the images, float32 [N, n_features]; arguments as for `forward`."""
        pooled: Tensor = self.trunk(images)
        return pooled

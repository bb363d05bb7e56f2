"""What carries `x` past a residual block where the shape changes; inside a stage that is the identity."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bdtool.models.architectures import ShortcutKind


class OptionAShortcut(nn.Module):
    """Take every `stride`-th pixel and pad zero channels on both sides.

    Source: He et al., CVPR 2016, section 4.1, option A, as in akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, n_in: int, n_out: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.n_before = (n_out - n_in) // 2
        self.n_after = n_out - n_in - self.n_before

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, n_in, H, W] to [N, n_out, H / stride, W / stride]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.n_before, self.n_after))


class AveragePoolShortcut(nn.Module):
    """Average-pool, then append zero channels.

    Source: BlockDrop's code, models/base.py, `DownsampleB` (there the zeros are copies of `x` times 0).
    """

    def __init__(self, n_in: int, n_out: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.n_after = n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, n_in, H, W] to [N, n_out, H / stride, W / stride]."""
        return F.pad(F.avg_pool2d(x, self.stride), (0, 0, 0, 0, 0, self.n_after))


class ProjectionShortcut(nn.Module):
    """1x1 convolution and batch normalisation: He et al., CVPR 2016, section 4.1, option B."""

    def __init__(self, n_in: int, n_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel_size=1, stride=stride, bias=False)
        self.bn = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, n_in, H, W] to [N, n_out, H / stride, W / stride]."""
        y: Tensor = self.bn(self.conv(x))
        return y


_SHORTCUTS: dict[ShortcutKind, type[OptionAShortcut] | type[AveragePoolShortcut] | type[ProjectionShortcut]] = {
    "option-a": OptionAShortcut,
    "average-pool": AveragePoolShortcut,
    "projection": ProjectionShortcut,
}


def make_shortcut(kind: ShortcutKind, n_in: int, n_out: int, *, stride: int) -> nn.Module:
    """Return the identity where the shape stays, else a shortcut of that kind."""
    if stride == 1 and n_in == n_out:
        return nn.Identity()
    return _SHORTCUTS[kind](n_in, n_out, stride=stride)

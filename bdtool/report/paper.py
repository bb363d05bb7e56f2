"""What BlockDrop's authors measured, to stand beside our own figures."""

from __future__ import annotations

from bdtool.report.data import OperatingPoint
from bdtool.specs import NetworkSpec

_PAPER = "BlockDrop, Wu et al., CVPR 2018, Table 1"
_README = "BlockDrop's authors, README of their code"

CIFAR10_POINTS = (
    OperatingPoint(
        name="paper: ResNet-110, CIFAR-10", accuracy=0.936, blocks_mean=16.93, flops_mean=1.81e8, source=_README
    ),
    OperatingPoint(name="paper: ResNet-32, CIFAR-10", accuracy=0.913, blocks_mean=6.9, flops_mean=None, source=_PAPER),
)
IMAGENET_POINTS = (
    OperatingPoint(
        name="paper: ResNet-101, ImageNet", accuracy=0.764, blocks_mean=24.77, flops_mean=1.25e10, source=_README
    ),
)


def paper_points(network: NetworkSpec) -> tuple[OperatingPoint, ...]:
    """Return the paper's results on what looks like the network's data set, judged by input size and classes."""
    if network.n_classes == 1000:
        return IMAGENET_POINTS
    looks_like_cifar10 = network.n_classes == 10 and network.preprocessing.height == 32
    names_others = network.labels is not None and "truck" not in network.labels
    return CIFAR10_POINTS if looks_like_cifar10 and not names_others else ()

"""What finding the block that is missed least costs, paths run together until they part or each from the stem on.

    python benchmarks/nested_masks.py [ARCH...] [--images 64] [--rounds 3]

Both give the same losses: those of every block of a network with random weights left out in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from bdtool.models.model import build_model
from bdtool.models.resnet import ResNet
from bdtool.training.base_spec import base_spec
from bdtool.training.nested import losses_without_each, path_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", default=["resnet32", "resnet110"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| network | each from the stem, s | together, s | ratio |\n|---|---|---|---|")
    for arch in args.archs:
        apart, together = _compare(arch, n_images=args.images, rounds=args.rounds)
        print(f"| {arch} | {apart:.2f} | {together:.2f} | {together / apart:.2f} |", flush=True)


def _compare(arch: str, *, n_images: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds of both, in alternating rounds."""
    base = build_model(base_spec(arch, data="cifar10:benchmark"), seed=0).base.eval()
    base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n_images, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (n_images,), generator=generator)
    mask = torch.ones(len(base.blocks), dtype=torch.bool)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, Tensor] = {}
    for _ in range(rounds):
        for together in (False, True):
            start = time.perf_counter()
            found[together] = (losses_without_each if together else _each_apart)(base, images, labels, mask)
            seconds[together].append(time.perf_counter() - start)
    torch.testing.assert_close(found[True], found[False])
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def _each_apart(base: ResNet, images: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    losses = []
    for k in mask.nonzero().flatten().tolist():
        smaller = mask.clone()
        smaller[k] = False
        losses.append(path_losses(base, images, labels, smaller).mean())
    return torch.stack(losses)


if __name__ == "__main__":
    main()

"""What a training step costs against the plain formulation: every block computed for every image, then masked.

    python benchmarks/training.py [--arch resnet32] [--kept 0.4] [--batch 256] [--rounds 9] [--threads 2]

Then what bfloat16 and torch.compile bring to pretraining.

Both do the same arithmetic for the same keep bits, in alternating rounds of one process, with the same number format,
memory layout and policy network; the plain one is the authors' formulation, which runs both passes whole. Before it is
timed, the gradients of both are compared in float32 with fixed batch statistics (over a batch, statistics differ by
design: the plain formulation takes them over all images, ours over the images that keep the block).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdtool.models.model import BlockDropModel, build_model
from bdtool.models.resnet import ResNet
from bdtool.training import tasks
from bdtool.training.base_spec import base_spec
from bdtool.training.options import CurriculumOptions, FinetuneOptions, PretrainOptions
from bdtool.training.policy_network import with_policy
from bdtool.training.stages import computes_in_bfloat16

_FLIPPED = 0.2  # share of the sampled bits that differ from the greedy ones: alpha = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet32")
    parser.add_argument("--kept", type=float, default=0.4, help="share of blocks kept, over both passes")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    amp = computes_in_bfloat16("auto", torch.device("cpu"))
    images, labels, uniforms, keeps = _inputs(args.arch, args.batch, args.kept)
    shares = ", ".join(f"{float(keep.float().mean()):.3f}" for keep in keeps)
    print(f"{args.arch}, batch {args.batch}, kept (greedy, sampled) {shares}, {'bf16' if amp else 'fp32'}")
    print(f"threads {torch.get_num_threads()}, torch {torch.__version__}, medians of {args.rounds} alternating rounds")
    print("| stage | plain, images/s | bdtool, images/s | ratio | worst gradient difference |")
    print("|---|---|---|---|---|")
    for stage in ("curriculum", "finetune"):
        difference = _gradient_difference(args.arch, stage, images[:32], labels[:32], uniforms[:32], keeps)
        with _fixed_choice(keeps):
            steps = [_step(args.arch, stage, images, labels, uniforms, amp=amp, plain=plain) for plain in (True, False)]
            plain, ours = _alternate(steps, args.rounds)
        rates = f"{args.batch / plain:.0f} | {args.batch / ours:.0f}"
        print(f"| {stage} | {rates} | {plain / ours:.2f} | {difference:.1e} of the largest |")
    _print_pretraining(args.arch, images, labels, rounds=args.rounds)


def _inputs(arch: str, batch: int, kept: float) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    n_blocks = _model(arch).n_blocks
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    uniforms = torch.rand(batch, n_blocks, generator=generator)
    share = (kept - _FLIPPED / 2) / (1 - _FLIPPED)  # so that the mean of both matrices is `kept`
    greedy = torch.rand(batch, n_blocks, generator=generator) < share
    sampled = greedy ^ (torch.rand(batch, n_blocks, generator=generator) < _FLIPPED)
    return images, labels, uniforms, (greedy, sampled)


def _model(arch: str) -> BlockDropModel:
    base = build_model(base_spec(arch, data="cifar10:benchmark"), seed=0)
    return with_policy(base, seed=0).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _task(arch: str, stage: str, *, amp: bool, plain: bool) -> tuple[BlockDropModel, tasks.Task]:
    model = _model(arch)
    if plain:
        model.base.forward = lambda images, keep=None: plain_forward(model.base, images, keep)  # type: ignore[method-assign]
    if stage == "finetune":
        return model, tasks.FinetuneTask(model, FinetuneOptions(), amp=amp)
    task = tasks.CurriculumTask(model, CurriculumOptions(), amp=amp)
    if plain:
        model.base.eval()

        @torch.no_grad()
        def both(images: Tensor, greedy: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
            with tasks.autocast(images.device, enabled=amp):
                return model.base(images, greedy).float(), model.base(images, sampled).float()

        task._module._logits = both
    return model, task


def plain_forward(base: ResNet, images: Tensor, keep: Tensor | None) -> Tensor:
    """Return the logits of the authors' formulation: each block computed for all images, then masked."""
    x = base.stem(images)
    assert keep is not None
    for k, block in enumerate(base.blocks):
        passed = block.shortcut(x)
        mask = keep[:, k, None, None, None].to(x.dtype)
        x = F.relu(passed + block.residual(x)) * mask + passed * (1 - mask)
    logits: Tensor = base.head(x)
    return logits


@contextmanager
def _fixed_choice(keeps: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Let the policy network compute its probabilities, but take these bits."""
    choose = tasks._choose

    def fixed(probability: Tensor, uniforms: Tensor, learned: Tensor, alpha: float) -> tasks._Choice:
        bounded = choose(probability, uniforms, learned, alpha).bounded
        greedy, sampled = (keep[: len(uniforms)] for keep in keeps)
        return tasks._Choice(bounded=bounded, greedy=greedy, sampled=sampled)

    with mock.patch.object(tasks, "_choose", fixed):
        yield


def _step(
    arch: str, stage: str, images: Tensor, labels: Tensor, uniforms: Tensor, *, amp: bool, plain: bool
) -> Callable[[], None]:
    _, task = _task(arch, stage, amp=amp, plain=plain)
    return _repeat(task, images, labels, uniforms)


def _repeat(task: tasks.Task, images: Tensor, labels: Tensor, uniforms: Tensor) -> Callable[[], None]:
    """Return a function that does one training step of `task` on these images."""
    optimizers = task.optimizers()

    def step() -> None:
        task.begin_step(tasks.Step(10**6, 1, torch.arange(len(images))))
        loss = task.module(images, labels, uniforms).loss
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def _gradient_difference(
    arch: str, stage: str, images: Tensor, labels: Tensor, uniforms: Tensor, keeps: tuple[Tensor, Tensor]
) -> float:
    """Return the largest difference of any gradient between both formulations, relative to the largest gradient."""
    found = []
    for plain in (True, False):
        model, task = _task(arch, stage, amp=False, plain=plain)
        task.begin_step(tasks.Step(10**6, 1, torch.arange(len(images))))
        for module in model.base.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        with _fixed_choice(keeps), mock.patch.object(model.base, "train", return_value=model.base):
            task.module(images, labels, uniforms).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain_gradients, ours = found
    assert plain_gradients.keys() == ours.keys()
    largest = max(float(g.abs().max()) for g in plain_gradients.values())
    return max(float((plain_gradients[n] - ours[n]).abs().max()) for n in ours) / largest


def _alternate(steps: list[Callable[[], None]], rounds: int) -> list[float]:
    """Return the median seconds of each step, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 1):
        for step, times in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]


def _print_pretraining(arch: str, images: Tensor, labels: Tensor, *, rounds: int) -> None:
    """Print what bfloat16 and torch.compile bring to pretraining, and how long the first compiled step takes."""
    steps = []
    for amp, compiled in ((False, False), (True, False), (True, True)):
        model = _model(arch)
        task = tasks.PretrainTask(model, PretrainOptions(compile=compiled), amp=amp)
        steps.append(_repeat(task, images, labels, images.new_empty(len(images), 0)))
    start = time.perf_counter()
    steps[-1]()
    first = time.perf_counter() - start
    rates = [len(images) / seconds for seconds in _alternate(steps, rounds)]
    named = ", ".join(
        f"{name} {rate:.0f}" for name, rate in zip(("fp32", "bf16", "bf16 --compile"), rates, strict=True)
    )
    print(f"pretraining, images/s: {named}; first compiled step {first:.0f} s")


if __name__ == "__main__":
    main()

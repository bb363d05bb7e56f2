"""What a run draws, step by step, and when it is saved: a trainer whose images and task only note it."""

import dataclasses
import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from bdtool.errors import UsageError
from bdtool.training.distributed import Group
from bdtool.training.options import TrainOptions
from bdtool.training.tasks import Outcome, Step
from bdtool.training.trainer import Trainer


class _Draws:
    """Images, and a task, that note what they were drawn with: which images, and the numbers for both, by step."""

    n_images, facts = 48, dict[str, str | int]()
    module: nn.Module

    def __init__(self, n_uniforms: int) -> None:
        self.n_uniforms = n_uniforms
        self.noted: list[torch.Tensor] = []
        self.index: list[torch.Tensor] = []
        self.module = nn.Linear(1, 1)
        self.module.forward = self.outcome  # type: ignore[method-assign]

    def batch(self, index: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.index.append(index)
        self.noted.append(uniforms)
        return torch.zeros(len(index), 1), index

    def outcome(self, images: torch.Tensor, labels: torch.Tensor, uniforms: torch.Tensor) -> Outcome:
        self.noted.append(uniforms)
        return Outcome(self.module.weight.sum(), images, images, images)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.module.parameters(), lr=0.1)]

    def begin_step(self, step: Step) -> str:
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Apart(Group):
    """One of several processes, without the others."""

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values


def trainer_of_draws(
    images: _Draws, task: _Draws, *, rank: int = 0, size: int = 1, epochs: int = 2, batch: int = 12, **options: Any
) -> Trainer:
    group = _Apart(rank=rank, size=size, device=torch.device("cpu"))
    asked = TrainOptions(epochs=epochs, batch=batch, lr=0.1, seed=options.pop("seed", 0))
    return Trainer(cast(Any, task.module), cast(Any, task), images, asked, group=group, request={}, **options)


def drawn(**options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the images [8, n] and the numbers for both [8, n, n_uniforms] of 2 epochs of 4 steps."""
    images, task = _Draws(2), _Draws(3)
    trainer_of_draws(images, task, **options).run()
    index, augment = (torch.stack(noted[:8]) for noted in (images.index, images.noted))  # the next batch is read ahead
    return index, augment, torch.stack(task.noted)


def test_every_draw_is_new() -> None:
    index, augment, numbers = drawn()
    for epoch in (index[:4], index[4:]):
        assert sorted(epoch.flatten().tolist()) == list(range(48)), "each image once"
    assert not torch.equal(index[:4], index[4:])
    others = drawn(seed=1)
    assert not torch.equal(index, others[0])
    every = torch.cat([draw.flatten() for draw in (augment, numbers, *others[1:])])
    assert (augment.shape, numbers.shape) == ((8, 12, 2), (8, 12, 3))
    assert len(every.unique()) > 0.99 * len(every), "of float32 few meet by chance"


def test_processes_share_what_one_draws() -> None:
    for whole, *shares in zip(drawn(), drawn(rank=0, size=2), drawn(rank=1, size=2), strict=True):
        assert torch.equal(torch.stack(shares, dim=2).flatten(1, 2), whole)


def test_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch 12: expected .* images of the data, and a multiple of the 5 proc"):
        trainer_of_draws(_Draws(2), _Draws(3), size=5)


def test_little_is_written_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 steps of 10 seconds each sixth, the first behind 50 seconds, is saved."""
    steps: list[int] = []
    monkeypatch.setattr("bdtool.training.trainer.write_progress", lambda path, state: steps.append(state["step"]))
    clock = SimpleNamespace(monotonic=itertools.count(step=10).__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr("bdtool.training.trainer.time", clock)
    asked = {"epochs": 1, "batch": 2, "checkpoint": tmp_path / "m.checkpoint", "save_every_s": 50}
    trainer_of_draws(_Draws(2), _Draws(3), **asked).run()
    assert steps == [6, 12, 18, 24]

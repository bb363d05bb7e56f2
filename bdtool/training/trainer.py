"""The loop: steps, schedules, epochs, checkpoints and interruption, the same for every task.

All randomness of a step is drawn from (seed, step), and that of an epoch's order from (seed, epoch). So a run that goes
on from a checkpoint repeats exactly what an unbroken run does, and several processes draw alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdtool.errors import UsageError
from bdtool.models.model import BlockDropModel
from bdtool.models.state import non_finite_names
from bdtool.training.distributed import Group
from bdtool.training.images import TrainingImages
from bdtool.training.options import Schedule, TrainOptions
from bdtool.training.progress_file import diverged, read_progress, write_progress
from bdtool.training.stopping import Interrupted, Stop, StopNow, stop_signals
from bdtool.training.tasks import Outcome, Step, Task
from bdtool.words import listing

_WARM_UP = 0.15  # share of a one-cycle run in which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Means over the images of an epoch, as sampled while learning; `validation` is what `validate` gave."""

    epoch: int
    loss: float
    accuracy: float
    blocks_mean: float
    reward: float
    seconds: float  # of its steps, waiting for their images included
    note: str
    validation: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run shows after a step: how far it is, and the means of the epoch so far."""

    step: int
    n_steps: int
    loss: float
    accuracy: float
    blocks_mean: float
    reward: float
    note: str


@dataclass(frozen=True)
class _Batch:
    """A process's share of a step: which images of the data set, the images, labels, and numbers for the task."""

    index: Tensor
    images: Tensor
    labels: Tensor
    uniforms: Tensor


class Trainer:
    """Runs a task from its first step, or from a checkpoint, to its last.

    Args:
        request: everything that was asked for, as JSON values; a checkpoint of another request is refused.
        checkpoint: the file for unfinished work; None keeps none.
        save_every_s: at most this long of work is lost when the process is killed.
        on_step: receives a `Report` after each step, on the first process.
        validate: measures the model after each epoch, on the first process.
    """

    def __init__(
        self,
        model: BlockDropModel,
        task: Task,
        images: TrainingImages,
        options: TrainOptions,
        *,
        group: Group,
        request: Mapping[str, Any],
        checkpoint: Path | None = None,
        save_every_s: float = 120,
        on_step: Callable[[Report], None] = lambda report: None,
        on_epoch: Callable[[Epoch], None] = lambda epoch: None,
        validate: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        if options.batch > images.n_images or options.batch % group.size:
            multiple = f", and a multiple of the {group.size} processes" if group.size > 1 else ""
            raise UsageError(
                f"batch {options.batch}: expected at most the {images.n_images} images of the data{multiple}; choose "
                "another --batch"
            )
        self._model, self._task, self._images, self._options, self._group = model, task, images, options, group
        self._request, self._checkpoint, self._save_every_s = dict(request), checkpoint, save_every_s
        self._on_step, self._on_epoch, self._validate = on_step, on_epoch, validate
        self._steps_per_epoch = images.n_images // options.batch
        self.n_steps = options.n_steps(self._steps_per_epoch)
        self.step = 0
        self.epochs: list[Epoch] = []
        self._note = ""  # what the last step had to show
        self._sums = torch.zeros(5, dtype=torch.float64)  # loss, correct, blocks, reward, seconds of this epoch
        self._optimizers = task.optimizers()
        factor = schedule_factor(options.schedule, self.n_steps)
        self._schedulers = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self._optimizers]
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        if checkpoint is not None and checkpoint.exists():
            self._restore(read_progress(checkpoint, request=self._request))
        self._module = group.wrap(task.module)

    @property
    def where(self) -> str:
        return f"step {self.step} of {self.n_steps}"

    def run(self) -> list[Epoch]:
        """Train to the end and return the epochs; the checkpoint stays for the caller to remove.

        Raises:
            TrainingError: loss or weights became NaN or infinite; a checkpoint holds a state before that.
            Interrupted: SIGINT or SIGTERM came; the step in hand was finished and saved, a measurement broken off.
        """
        saved = time.monotonic()
        with stop_signals() as stop, ThreadPoolExecutor(max_workers=1) as ahead:
            if self._epoch_is_over():
                self._finish_epoch(stop)  # the checkpoint is of a run that broke off while it measured
            following = ahead.submit(self._batch, self.step)
            while self.step < self.n_steps:
                start = time.perf_counter()
                batch = following.result()
                following = ahead.submit(self._batch, self.step + 1)  # read while this step computes
                self._train_step(batch)
                self._sums[4] += time.perf_counter() - start
                stopping = self._anyone(stop.requested)
                if self._epoch_is_over() or stopping or time.monotonic() - saved > self._save_every_s:
                    self._save()  # before measuring, which may fail or be broken off
                    saved = time.monotonic()
                if stopping and self.step < self.n_steps:
                    raise self._interrupted()
                if self._epoch_is_over():
                    self._finish_epoch(stop)
        return self.epochs

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped after {self.where}; the same command with --resume goes on")

    def _train_step(self, batch: _Batch) -> None:
        self._note = self._task.begin_step(
            Step(self.step, self._steps_per_epoch, batch.index, rank=self._group.rank, n_ranks=self._group.size)
        )
        outcome: Outcome = self._module(batch.images, batch.labels, batch.uniforms)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        means = self._group.mean(_means(outcome))
        if not math.isfinite(means[0]):
            raise diverged(f"the loss is {float(means[0])} at {self.where}", self._checkpoint)
        for optimizer, scheduler in zip(self._optimizers, self._schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        self.step += 1
        self._sums[:4] += means
        if self._group.is_first:
            self._on_step(self._report())

    def _batch(self, step: int) -> _Batch:
        mine = slice(self._group.rank, None, self._group.size)
        index = self._indices(step)[mine]
        generator = _generator(self._options.seed, 1, step)
        n_augment = self._images.n_uniforms
        uniforms = torch.rand(self._options.batch, n_augment + self._task.n_uniforms, generator=generator)[mine]
        images, labels = self._images.batch(index, uniforms[:, :n_augment])
        return _Batch(index, images, labels, uniforms[:, n_augment:].to(images.device))

    def _indices(self, step: int) -> Tensor:
        epoch, within = divmod(step, self._steps_per_epoch)
        if self._order[0] != epoch:
            generator = _generator(self._options.seed, 0, epoch)
            self._order = (epoch, torch.randperm(self._images.n_images, generator=generator))
        return self._order[1][within * self._options.batch : (within + 1) * self._options.batch]

    def _steps_of_epoch(self) -> int:
        return (self.step - 1) % self._steps_per_epoch + 1

    def _epoch_is_over(self) -> bool:
        """Say whether an epoch is trained, the last one maybe a part of one, that `epochs` does not have yet."""
        whole, rest = divmod(self.step, self._steps_per_epoch)
        return len(self.epochs) < whole + (rest > 0 and self.step == self.n_steps)

    def _report(self) -> Report:
        loss, accuracy, blocks, reward, _ = (self._sums / self._steps_of_epoch()).tolist()
        return Report(
            step=self.step,
            n_steps=self.n_steps,
            loss=loss,
            accuracy=accuracy,
            blocks_mean=blocks,
            reward=reward,
            note=self._note,
        )

    def _finish_epoch(self, stop: Stop) -> None:
        try:
            # several processes stop together, after a step: the others wait there for the one that measures
            with stop.at_once() if self._group.size == 1 else nullcontext():
                validation = dict(self._validate()) if self._group.is_first else {}
        except StopNow:
            raise self._interrupted() from None
        report = asdict(self._report())
        epoch = Epoch(
            epoch=len(self.epochs) + 1,
            seconds=float(self._sums[4]),
            validation=validation,
            **{name: report[name] for name in ("loss", "accuracy", "blocks_mean", "reward", "note")},
        )
        self.epochs.append(epoch)
        self._sums.zero_()
        if self._group.is_first:
            self._on_epoch(epoch)

    def _anyone(self, flag: bool) -> bool:
        return bool(self._group.mean(torch.tensor(float(flag))) > 0)

    def _save(self) -> None:
        if bad := non_finite_names(self._model.state_dict()):
            raise diverged(f"NaN or infinite weights after {self.where} in {listing(bad)}", self._checkpoint)
        if self._checkpoint is None or not self._group.is_first:
            return
        write_progress(
            self._checkpoint,
            {
                "request": self._request,
                "step": self.step,
                "seed": self._options.seed,  # with the step, the whole state of the random numbers
                "model": self._model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
                "schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
                "sums": self._sums,
                "note": self._note,
                "epochs": [asdict(epoch) for epoch in self.epochs],
            },
        )

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.step = state["step"]
        self._sums, self._note = state["sums"], state.get("note", "")
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]


def schedule_factor(schedule: Schedule, n_steps: int) -> Callable[[int], float]:
    """Return the function from a step's number to what its learning rate is multiplied with."""

    def factor(step: int) -> float:
        done = step / n_steps
        if schedule == "one-cycle":
            if done < _WARM_UP:
                return 0.1 + 0.9 * done / _WARM_UP
            return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if schedule == "step":
            return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
        return 1.0

    return factor


def _generator(seed: int, purpose: int, number: int) -> torch.Generator:
    """Return a generator for that step or epoch; its stream is independent of all others'."""
    state = np.random.SeedSequence([seed, purpose, number]).generate_state(1, dtype=np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def _means(outcome: Outcome) -> Tensor:
    """Return loss, accuracy, blocks and reward as float64 [4], by one transfer from the device."""
    values = [outcome.loss, outcome.correct.mean(), outcome.n_blocks.mean(), outcome.reward.mean()]
    return torch.stack([value.detach().float() for value in values]).double()

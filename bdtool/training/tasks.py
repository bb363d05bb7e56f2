"""The three things to train, each as one module from a batch to its loss, with its optimizers.

Sections and equations are those of Wu, Nagarajan et al., "BlockDrop", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdtool.models.model import BlockDropModel
from bdtool.specs import DEFAULT_THRESHOLD
from bdtool.training.options import CurriculumOptions, FinetuneOptions, PretrainOptions
from bdtool.training.passes import frozen_copy, paired_logits
from bdtool.training.policy_gradient import bound_probability, entropy, learned_blocks, policy_loss, reward
from bdtool.training.teacher import Teacher, distillation_loss


class Outcome(NamedTuple):
    """A step's loss, a scalar, and what to log of each image: correct, blocks kept, reward, each float32 [N]."""

    loss: Tensor
    correct: Tensor
    n_blocks: Tensor
    reward: Tensor


class Step(NamedTuple):
    """Where the run is: the number of this step from 0, the steps in an epoch, and this process among how many.

    `images`, int64 [n] on the CPU, says which images of the data set this process has in this step.
    """

    number: int
    per_epoch: int
    images: Tensor
    rank: int = 0
    n_ranks: int = 1


Paths = Callable[[Step], Tensor]  # keep bits, bool [n, K] on the CPU, of this process's images of a step


class Task(Protocol):
    """One of the things to train.

    Attributes:
        module: images float32 [n, 3, H, W], labels int64 [n], uniforms float32 [n, n_uniforms] to an `Outcome`.
        n_uniforms: uniform numbers in [0, 1) that it takes for each image, besides those of the augmentation.
    """

    module: nn.Module
    n_uniforms: int

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers, each with its highest learning rates."""

    def begin_step(self, step: Step) -> str:
        """Prepare for a step and return what to show of it ("last 3 of 15 blocks"), or an empty string."""


def autocast(device: torch.device, *, enabled: bool) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


class PretrainTask:
    """The base network by cross-entropy, all blocks kept."""

    n_uniforms = 0

    def __init__(self, model: BlockDropModel, options: PretrainOptions, *, amp: bool) -> None:
        self._options = options
        self._model = model
        self.module: nn.Module = _Pretrain(model, amp=amp)
        if options.compile:
            self.module.compile()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [_sgd(self._model.base, self._options.lr, self._options.momentum, self._options.weight_decay)]

    def begin_step(self, step: Step) -> str:
        self._model.base.train()
        return ""


class CurriculumTask:
    """The policy network against a frozen base (section 3.3): more and more blocks are learned, the last ones first."""

    def __init__(self, model: BlockDropModel, options: CurriculumOptions, *, amp: bool) -> None:
        assert model.policy is not None
        self._options = options
        self._model = model
        self.n_uniforms = model.n_blocks
        self._module = _Curriculum(model, options, amp=amp)
        self.module: nn.Module = self._module

    def optimizers(self) -> list[torch.optim.Optimizer]:
        assert self._model.policy is not None
        return [torch.optim.Adam(self._model.policy.parameters(), lr=self._options.lr)]

    def begin_step(self, step: Step) -> str:
        self._module.policy.train()
        n_blocks = self._model.n_blocks
        n_learned = self._options.n_learned(step.number, steps_per_epoch=step.per_epoch, n_blocks=n_blocks)
        self._module.n_learned = n_learned
        return f"last {n_learned} of {n_blocks} blocks"


class FinetuneTask:
    """Base and policy network together, or the base alone along given paths; the base learns from a teacher, too."""

    def __init__(
        self,
        model: BlockDropModel,
        options: FinetuneOptions,
        paths: Paths | None = None,
        *,
        teacher: Teacher | None = None,
        amp: bool,
    ) -> None:
        self._options = options
        self._model = model
        self._learns_policy = paths is None
        self.n_uniforms = model.n_blocks if self._learns_policy else 0
        self._module = _Finetune(model, options, paths, teacher, amp=amp)
        self.module: nn.Module = self._module

    def optimizers(self) -> list[torch.optim.Optimizer]:
        options = self._options
        base = _sgd(self._model.base, options.base_lr, options.momentum, options.weight_decay)
        if not self._learns_policy:
            return [base]
        assert self._model.policy is not None
        return [base, torch.optim.Adam(self._model.policy.parameters(), lr=options.lr)]

    def begin_step(self, step: Step) -> str:
        self._module.train()
        self._module.step = step
        return ""


def _sgd(base: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        base.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
    )


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The policy network's answer for a batch, and the bits that were drawn from it; all [N, K]."""

    bounded: Tensor
    greedy: Tensor
    sampled: Tensor


def _choose(probability: Tensor, uniforms: Tensor, learned: Tensor, alpha: float) -> _Choice:
    """Draw u ~ Bernoulli(s'), and take the greedy bits s >= 0.5; blocks that are not learned yet are kept in both."""
    bounded = bound_probability(probability.float(), alpha)
    with torch.no_grad():
        sampled = (uniforms < bounded) | ~learned
        greedy = (probability >= DEFAULT_THRESHOLD) | ~learned
    return _Choice(bounded=bounded, greedy=greedy, sampled=sampled)


class _Pretrain(nn.Module):
    def __init__(self, model: BlockDropModel, *, amp: bool) -> None:
        super().__init__()
        self.base = model.base
        self._amp = amp

    def forward(self, images: Tensor, labels: Tensor, uniforms: Tensor) -> Outcome:
        with autocast(images.device, enabled=self._amp):
            logits = self.base(images).float()
        correct = (logits.argmax(dim=1) == labels).float()
        n_blocks = torch.full_like(correct, len(self.base.blocks))
        return Outcome(F.cross_entropy(logits, labels), correct, n_blocks, torch.zeros_like(correct))


class _Curriculum(nn.Module):
    def __init__(self, model: BlockDropModel, options: CurriculumOptions, *, amp: bool) -> None:
        super().__init__()
        assert model.policy is not None
        self.policy = model.policy
        self.n_learned = model.n_blocks
        # in a function, not a submodule: it is frozen, so neither the optimizer nor the processes of a group share it
        frozen = frozen_copy(model.base, dtype=torch.bfloat16 if amp else torch.float32)
        self._logits: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda images, greedy, sampled: (
            paired_logits(frozen, images, greedy, sampled)
        )
        self._options = options
        self._amp = amp

    def forward(self, images: Tensor, labels: Tensor, uniforms: Tensor) -> Outcome:
        options = self._options
        with autocast(images.device, enabled=self._amp):
            probability = self.policy(images)
        learned = learned_blocks(uniforms.shape[1], self.n_learned, device=images.device)
        choice = _choose(probability, uniforms, learned, options.alpha)
        greedy_logits, sampled_logits = self._logits(images, choice.greedy, choice.sampled)
        correct = sampled_logits.argmax(dim=1) == labels
        sampled_reward = reward(choice.sampled, correct, options.gamma)
        greedy_reward = reward(choice.greedy, greedy_logits.argmax(dim=1) == labels, options.gamma)
        loss = policy_loss(choice.bounded, choice.sampled, sampled_reward - greedy_reward, learned)
        loss = loss - options.entropy * entropy(choice.bounded, learned)
        return Outcome(loss, correct.float(), choice.sampled.float().sum(dim=1), sampled_reward)


class _Finetune(nn.Module):
    def __init__(
        self,
        model: BlockDropModel,
        options: FinetuneOptions,
        paths: Paths | None,
        teacher: Teacher | None,
        *,
        amp: bool,
    ) -> None:
        super().__init__()
        self.base = model.base
        self.policy = model.policy
        self.step: Step | None = None
        self._paths = paths
        self._teacher = teacher
        self._options = options
        self._amp = amp

    def forward(self, images: Tensor, labels: Tensor, uniforms: Tensor) -> Outcome:
        if self._paths is not None:
            assert self.step is not None
            return self._along(self._paths(self.step).to(images.device), images, labels)
        assert self.policy is not None
        options = self._options
        with autocast(images.device, enabled=self._amp):
            probability = self.policy(images)
        learned = learned_blocks(uniforms.shape[1], uniforms.shape[1], device=images.device)
        choice = _choose(probability, uniforms, learned, options.alpha)
        logits = self._base_logits(images, choice.sampled)
        correct = logits.argmax(dim=1) == labels
        sampled_reward = reward(choice.sampled, correct, options.gamma)
        greedy_reward = reward(choice.greedy, self._greedy_correct(images, labels, choice.greedy), options.gamma)
        loss = policy_loss(choice.bounded, choice.sampled, sampled_reward - greedy_reward, learned)
        loss = loss - options.entropy * entropy(choice.bounded, learned) + self._base_loss(logits, images, labels)
        return Outcome(loss, correct.float(), choice.sampled.float().sum(dim=1), sampled_reward)

    def _along(self, keep: Tensor, images: Tensor, labels: Tensor) -> Outcome:
        """Return the step of the base alone."""
        logits = self._base_logits(images, keep)
        correct = logits.argmax(dim=1) == labels
        loss = self._base_loss(logits, images, labels)
        return Outcome(loss, correct.float(), keep.float().sum(dim=1), reward(keep, correct, self._options.gamma))

    def _base_loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        if self._teacher is None:
            return F.cross_entropy(logits, labels)
        with autocast(images.device, enabled=self._amp):
            taught = self._teacher.logits(images)
        return distillation_loss(logits, taught.float(), labels)

    def _base_logits(self, images: Tensor, keep: Tensor) -> Tensor:
        with autocast(images.device, enabled=self._amp):
            logits: Tensor = self.base(images, keep)
        return logits.float()

    def _greedy_correct(self, images: Tensor, labels: Tensor, greedy: Tensor) -> Tensor:
        """Say which images the greedy bits classify correctly, with the running statistics that are deployed."""
        self.base.eval()
        try:
            with torch.no_grad():
                return self._base_logits(images, greedy).argmax(dim=1) == labels
        finally:
            self.base.train()

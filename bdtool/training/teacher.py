"""Knowledge distillation (Hinton, Vinyals, Dean 2015, section 2): a base that learns from another network's answers.

Not in the paper of BlockDrop.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdtool.errors import UsageError
from bdtool.models.model import BlockDropModel
from bdtool.models.model_spec import ModelSpec
from bdtool.specs import keep_of
from bdtool.training.passes import frozen_copy

# temperature and weight of the teacher, of Zagoruyko and Komodakis, ICLR 2017, for the ResNets of CIFAR-10
_TEMPERATURE = 4.0
_WEIGHT = 0.9


class Teacher:
    """A trained base whose answers another one learns.

    Raises:
        UsageError: it has a policy network, other classes than the learner, or takes pictures of another size.
    """

    def __init__(self, teacher: BlockDropModel, learner: ModelSpec, *, device: torch.device) -> None:
        _check(teacher.spec, learner)
        self._base = frozen_copy(teacher.base, dtype=torch.float32).to(device)
        mask = teacher.spec.mask
        self._keep = None if mask is None else torch.from_numpy(keep_of(mask)).to(device)
        mine, theirs = teacher.spec.preprocessing, learner.preprocessing
        scale = np.divide(theirs.std, mine.std)
        offset = np.subtract(theirs.mean, mine.mean) / mine.std
        self._scale, self._offset = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1) for values in (scale, offset)
        )

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return logits float32 [N, n_classes] for images as the learner takes them, float32 [N, 3, H, W]."""
        keep = None if self._keep is None else self._keep.expand(len(images), -1)
        answers: Tensor = self._base(images * self._scale + self._offset, keep)
        return answers


def distillation_loss(logits: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """Return 0.1 of the cross-entropy with the labels, and 0.9 of that with the teacher's answers at temperature 4.

    The second, here without the teacher's entropy, is multiplied by the square of the temperature, so that the sizes of
    both gradients do not depend on it.

    Args:
        logits, taught: float32 [N, n_classes], of the learner and of its teacher.
        labels: int64 [N].
    """
    log_probability, log_taught = (F.log_softmax(values / _TEMPERATURE, dim=1) for values in (logits, taught))
    soft = F.kl_div(log_probability, log_taught, reduction="batchmean", log_target=True)
    return (1 - _WEIGHT) * F.cross_entropy(logits, labels) + _WEIGHT * _TEMPERATURE**2 * soft


def _check(teacher: ModelSpec, learner: ModelSpec) -> None:
    if teacher.has_policy:
        raise UsageError(
            "teacher: got a MODEL with a policy network, expected a base alone, which runs the same blocks for every "
            "image; `bdtool train pretrain` and `bdtool import` make one"
        )
    got, wanted = (spec.labels or spec.n_classes for spec in (teacher, learner))
    if got != wanted:
        raise UsageError(
            f"teacher: got {_classes(teacher)}, expected {_classes(learner)}, as the MODEL has; give one with the same "
            "names in the same order (`bdtool inspect` shows them)"
        )
    sizes = [(spec.preprocessing.height, spec.preprocessing.width) for spec in (teacher, learner)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"teacher: takes pictures of {sizes[0][0]} x {sizes[0][1]} pixels, the MODEL of {sizes[1][0]} x "
            f"{sizes[1][1]}; give one of that size"
        )


def _classes(spec: ModelSpec) -> str:
    named = f", from {spec.labels[0]!r} to {spec.labels[-1]!r}" if spec.labels else " without names"
    return f"{spec.n_classes} classes{named}"

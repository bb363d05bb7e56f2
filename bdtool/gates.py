"""What another precision costs: measured against fp32 on the same images and the same keep bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.evaluation import keep_for
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import PolicyRequest

_BATCH = 64
_POINTS = 100  # percentage points of a share of 1


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The figures of one comparison. None: not measured, for want of labels, of a policy network, or of an engine."""

    policy: str
    n_images: int
    input_source: str
    logits_error: float | None  # root mean square of the difference over that of the fp32 logits, on equal keep bits
    logits_worst: float | None  # largest |difference|
    changed_classes: float | None  # share of images
    policy_flips: float | None  # share of keep bits that the policy network of this precision decides otherwise
    accuracy_fp32: float | None
    accuracy: float | None
    max_accuracy_drop: float  # percentage points allowed

    @property
    def accuracy_drop(self) -> float | None:
        """Percentage points lost; negative where the precision does better by chance."""
        if self.accuracy is None or self.accuracy_fp32 is None:
            return None
        return _POINTS * (self.accuracy_fp32 - self.accuracy)

    @property
    def ok(self) -> bool:
        drop = self.accuracy_drop
        return drop is None or drop <= self.max_accuracy_drop + 1e-9  # a share of images has no more digits

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "accuracy_drop": self.accuracy_drop, "ok": self.ok}


def measure_gates(
    fp32: Orchestrator,
    other: Orchestrator,
    data: ImageSource,
    request: PolicyRequest,
    *,
    limit: int | None,
    max_accuracy_drop: float,
    on_batch: Callable[[int], None] = lambda n_images: None,
) -> Gates:
    """Run both on the first `limit` images (None: all) and compare.

    The keep bits are those of `request`, decided by the fp32 policy network where it is learned: a flipped bit would
    make any comparison of logits meaningless, so flips are counted apart.
    """
    tally = _Tally()
    first = 0
    for batch in data.batches(_BATCH, limit=limit):
        keep = keep_for(request, len(batch.images), first)
        bits = _keep_bits(fp32, batch.images) if fp32.network.has_policy else None
        keep = bits if keep is None else keep
        assert keep is not None
        tally.add(fp32.run(batch.images, policy=keep).logits, other.run(batch.images, policy=keep).logits, batch.labels)
        if bits is not None:
            tally.add_flips(bits != _keep_bits(other, batch.images))
        first += len(batch.images)
        on_batch(len(batch.images))
    return Gates(
        policy=request.name,
        n_images=first,
        input_source=data.description,
        max_accuracy_drop=max_accuracy_drop,
        **tally.figures(),
    )


def _keep_bits(runtime: Orchestrator, images: np.ndarray) -> np.ndarray:
    keep: np.ndarray = runtime.keep_probability(images) >= runtime.network.threshold
    return keep


class _Tally:
    """Sums over batches: memory does not grow with the data set."""

    def __init__(self) -> None:
        self._n = self._changed = self._n_labelled = self._right_fp32 = self._right = 0
        self._squares = self._squares_fp32 = self._worst = 0.0
        self._flips = self._n_bits = 0

    def add(self, fp32: np.ndarray, other: np.ndarray, labels: np.ndarray | None) -> None:
        difference = other.astype(np.float64) - fp32
        self._n += len(fp32)
        self._squares += float((difference**2).sum())
        self._squares_fp32 += float((fp32.astype(np.float64) ** 2).sum())
        self._worst = max(self._worst, float(np.abs(difference).max()))
        self._changed += int((other.argmax(axis=1) != fp32.argmax(axis=1)).sum())
        if labels is not None:
            self._n_labelled += len(labels)
            self._right_fp32 += int((fp32.argmax(axis=1) == labels).sum())
            self._right += int((other.argmax(axis=1) == labels).sum())

    def add_flips(self, flips: np.ndarray) -> None:
        self._flips += int(flips.sum())
        self._n_bits += flips.size

    def figures(self) -> dict[str, float | None]:
        labelled = self._n_labelled or None
        return {
            "logits_error": float(np.sqrt(self._squares / max(self._squares_fp32, 1e-30))),
            "logits_worst": self._worst,
            "changed_classes": self._changed / self._n,
            "policy_flips": self._flips / self._n_bits if self._n_bits else None,
            "accuracy_fp32": self._right_fp32 / labelled if labelled else None,
            "accuracy": self._right / labelled if labelled else None,
        }

"""What another precision costs: measured against fp32 on the same images and the same keep bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bdtool.data.batches import ImageBatch, ImageSource
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import PolicyRequest

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


@dataclass(frozen=True)
class _Answers:
    """What fp32 says of a batch: along `keep`, and the `bits` of its policy network, where it has one."""

    keep: np.ndarray
    bits: np.ndarray | None
    logits: np.ndarray


class Reference:
    """What fp32 says of a data set, asked once for all that is compared with it.

    The keep bits are those of `request`, decided by the fp32 policy network where it is learned: a flipped bit would
    make any comparison of logits meaningless, so flips are counted apart. Keeps logits and bits, but no images.
    """

    def __init__(self, fp32: Orchestrator, data: ImageSource, request: PolicyRequest) -> None:
        self.fp32, self.data, self.request = fp32, data, request
        self._answers: list[_Answers] = []

    def batches(self) -> Iterator[tuple[ImageBatch, _Answers]]:
        for i, batch in enumerate(self.data.batches(self.fp32.network.bulk_batch)):
            if i == len(self._answers):
                self._answers.append(self._ask(batch.images, batch.rows))
            yield batch, self._answers[i]

    def _ask(self, images: np.ndarray, rows: np.ndarray) -> _Answers:
        bits = self.fp32.decide(images) if self.fp32.network.has_policy else None
        keep = self.request.given_at(rows)
        keep = bits if keep is None else keep
        assert keep is not None
        return _Answers(keep, bits, self.fp32.run(images, policy=keep).logits)


def measure_gates(
    reference: Reference,
    other: Orchestrator,
    *,
    max_accuracy_drop: float,
    on_batch: Callable[[int], None] = lambda n_images: None,
) -> Gates:
    """Run `other` on the reference's images and compare."""
    tally = _Tally()
    n_images = 0
    for batch, fp32 in reference.batches():
        tally.add(fp32.logits, other.run(batch.images, policy=fp32.keep).logits, batch.labels)
        if fp32.bits is not None:
            tally.add_flips(fp32.bits != other.decide(batch.images))
        n_images += len(batch.images)
        on_batch(len(batch.images))
    return Gates(
        policy=reference.request.name,
        n_images=n_images,
        input_source=reference.data.description,
        max_accuracy_drop=max_accuracy_drop,
        **tally.figures(),
    )


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

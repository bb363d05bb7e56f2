"""What the images of a report are classified as, and what other policies would have cost and got right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.evaluation import Evaluation, evaluate
from bdtool.report.data import OperatingPoint
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from bdtool.runtime.policies import PolicyRequest, parse_policy_for
from export.bundle import Bundle

_COMPARED = ("all", "distribute", "random", "first")
_THRESHOLDS = (0.3, 0.7, 0.9)  # of the policy network, beside its own


@dataclass(frozen=True, kw_only=True)
class Classified:
    """What `classify_images` saw, one row for each image."""

    keep: np.ndarray  # bool [N, K]
    predicted: np.ndarray  # int [N]
    labels: np.ndarray | None  # int [N]

    @property
    def blocks_run(self) -> np.ndarray:
        blocks: np.ndarray = self.keep.sum(axis=1)
        return blocks

    @property
    def correct(self) -> np.ndarray | None:
        return None if self.labels is None else self.predicted == self.labels


def n_steps(source: ImageSource, *, is_learned: bool) -> int:
    """Return about how many images `gather_report` will classify."""
    n_compared = len(_COMPARED) + (len(_THRESHOLDS) if is_learned else 0)
    return source.n_images * (1 + (n_compared if source.has_labels else 0))


def classify_images(
    runtime: Orchestrator,
    source: ImageSource,
    policy: PolicyRequest,
    *,
    on_images: Callable[[int], None] = lambda n_images: None,
) -> Classified:
    """Classify the images, without a clock: in folders a class is a stretch of time, and machines change with time."""
    keep, predicted = [], []
    for batch in source.batches(runtime.network.bulk_batch):
        result = runtime.run(batch.images, policy=policy.given_at(batch.rows))
        keep.append(result.policy)
        predicted.append(result.classes)
        on_images(len(batch.images))
    return Classified(keep=np.concatenate(keep), predicted=np.concatenate(predicted), labels=source.labels)


def operating_points(
    runtime: Orchestrator,
    source: ImageSource,
    policy: PolicyRequest,
    classified: Classified,
    *,
    on_images: Callable[[int], None],
) -> tuple[OperatingPoint, ...]:
    """Return the policy's own accuracy and cost beside every block and the paper's heuristics at equally many blocks.

    Where the policy keeps all blocks or none, the heuristics keep half of them.
    """
    correct, network = classified.correct, runtime.network
    if correct is None:
        return ()
    flops = network.flops_per_image(classified.keep, with_policy=policy.is_learned)
    mine = f"this policy: {policy.name}"
    own = network.threshold if policy.is_learned else None
    points = [
        OperatingPoint(
            name=mine,
            accuracy=float(correct.mean()),
            blocks_mean=float(classified.blocks_run.mean()),
            flops_mean=float(flops.mean()),
            threshold=own,
        )
    ]
    n_kept = round(float(classified.blocks_run.mean()))
    n_kept = n_kept if 0 < n_kept < network.n_blocks else network.n_blocks // 2
    for form in _COMPARED:
        text = form if form == "all" else f"{form}:{n_kept}"
        named = parse_policy_for(network, text)
        if named.name == policy.name:
            continue
        result = evaluate(runtime, source, policy=text, on_batch=on_images)
        points.append(_point(text, result))
    return tuple(points)


def points_at_other_thresholds(
    bundle: Bundle, place: Place, source: ImageSource, *, on_images: Callable[[int], None]
) -> tuple[OperatingPoint, ...]:
    """Return what the policy network's decisions at other thresholds get right, and what they cost."""
    points = []
    for threshold in _THRESHOLDS if source.has_labels else ():
        if threshold == bundle.network.threshold:
            continue
        with place.open(bundle.with_threshold(threshold)) as runtime:
            result = evaluate(runtime, source, on_batch=on_images)
        points.append(_point(result.policy, result, threshold=threshold))
    return tuple(points)


def _point(name: str, found: Evaluation, *, threshold: float | None = None) -> OperatingPoint:
    return OperatingPoint(
        name=name,
        accuracy=found.accuracy,
        blocks_mean=found.blocks_mean,
        flops_mean=found.flops_mean,
        threshold=threshold,
    )

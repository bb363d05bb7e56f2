"""Accuracy and cost on labelled images, through PyTorch (a MODEL) or through engines (a bundle)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.errors import DataError, UsageError
from bdtool.runtime.place import Place
from bdtool.runtime.policies import PolicyRequest, parse_policy_for
from bdtool.runtime.result import RunResult
from bdtool.runtime.thresholds import threshold_of
from bdtool.specs import NetworkSpec
from export.bundle import Bundle

_TOP = 5  # classes of `accuracy_top5`


class Classifier(Protocol):
    """What can be evaluated: an `Orchestrator`, or a `TorchClassifier`."""

    @property
    def network(self) -> NetworkSpec: ...

    def run(self, images: np.ndarray, policy: np.ndarray | None = None) -> RunResult: ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one evaluation. FLOPs are 2 x multiply-accumulates for one image (the paper's rule).

    A learned policy's FLOPs hold the policy network; a given policy costs nothing to decide.
    """

    policy: str
    n_images: int
    accuracy: float  # share of images whose top-1 class is the label, 0 to 1
    accuracy_top5: float | None  # share whose label is among the 5 most probable; None: the model has no more classes
    blocks_mean: float
    blocks_std: float
    flops_mean: float
    flops_std: float
    full_flops: int
    unique_policies: int
    input_source: str


def evaluate(
    classifier: Classifier,
    data: ImageSource,
    *,
    policy: str | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda n_images: None,
) -> Evaluation:
    """Classify every image and count.

    Args:
        policy: a POLICY; None is what the network was trained for (`NetworkSpec.default_policy`).
        on_batch: called after each batch with its number of images.

    Raises:
        DataError: the data set has no labels.
        PolicyError: the policy does not fit the network.
    """
    if not data.has_labels:
        raise DataError(f"no labels in {data.description}; evaluate needs them: an .npz with y, or one folder a class")
    network = classifier.network
    request = parse_policy_for(network, policy)
    ranks, kept = [], []
    for batch in data.batches(batch_size):
        assert batch.labels is not None
        result = classifier.run(batch.images, policy=request.given_at(batch.rows))
        ranks.append(_ranks(result.logits, batch.labels))
        kept.append(result.policy)
        on_batch(len(batch.images))
    return _figures(network, request, np.concatenate(ranks), np.concatenate(kept), data.description)


def _ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the place of each image's label among its classes, int [N]: 0 is the most probable, as in `argmax`."""
    order = np.argsort(-logits, axis=1, kind="stable")
    return np.asarray((order == labels[:, None]).argmax(axis=1))


def _figures(
    network: NetworkSpec, request: PolicyRequest, ranks: np.ndarray, keep: np.ndarray, source: str
) -> Evaluation:
    blocks = keep.sum(axis=1)
    flops = network.flops_per_image(keep, with_policy=request.is_learned)
    return Evaluation(
        policy=request.name,
        n_images=len(ranks),
        accuracy=float((ranks == 0).mean()),
        accuracy_top5=float((ranks < _TOP).mean()) if network.n_classes > _TOP else None,
        blocks_mean=float(blocks.mean()),
        blocks_std=float(blocks.std()),
        flops_mean=float(flops.mean()),
        flops_std=float(flops.std()),
        full_flops=network.full_flops,
        unique_policies=len(np.unique(keep, axis=0)),
        input_source=source,
    )


def require_policies(network: NetworkSpec, policies: Iterable[str | None]) -> None:
    """Raise PolicyError unless each POLICY fits the network: before the first of them has taken minutes."""
    for policy in policies:
        parse_policy_for(network.with_threshold(threshold_of(policy)), policy)


@contextmanager
def open_classifier(path: Path, place: Place, *, threshold: float | None = None) -> Iterator[Classifier]:
    """Open a bundle directory through its engines, or a MODEL file through PyTorch on the CPU.

    Args:
        threshold: of the policy network, 0 to 1; None takes the model's.

    Raises:
        UsageError: a MODEL was asked to run on something else than PyTorch's CPU in fp32.
    """
    if path.is_dir():
        with place.open(Bundle.open(path).with_threshold(threshold)) as runtime:
            yield runtime
        return
    from bdtool.models.store import load_model
    from bdtool.torch_classifier import TorchClassifier

    default = Place()
    for name in ("backend", "device", "precision"):
        value = getattr(place, name)
        if value != getattr(default, name):
            raise UsageError(
                f"{path} is a MODEL, which runs in PyTorch on the CPU in fp32; --{name} {value} needs a BUNDLE. "
                "Make one: bdtool export"
            )
    with _torch_threads(place.threads):
        yield TorchClassifier(load_model(path), threshold=threshold)


@contextmanager
def _torch_threads(n_threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Gates: another precision beside fp32, which is asked once for all candidates."""

import dataclasses
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.calibrating.gates import Gates, Reference, measure_gates
from bdtool.data.batches import ImageSource
from bdtool.data.synthetic import synthetic_images
from bdtool.runtime.policies import parse_policy_for
from tests.conftest import Exported

_N = 100  # two batches


@pytest.fixture
def images() -> ImageSource:
    pictures = synthetic_images(_N, height=32, width=32)
    return ImageSource(
        description="pictures",
        is_real=True,
        names=[str(i) for i in range(_N)],
        labels=np.arange(_N) % 3,
        image_at=lambda index: pictures[index],
    )


@pytest.mark.parametrize("policy", [None, "random:2"])
def test_fp32_is_asked_once_for_all_candidates(tiny: Exported, images: ImageSource, policy: str | None) -> None:
    with Orchestrator.open(tiny.bundle) as fp32, Orchestrator.open(tiny.bundle) as other:
        request = parse_policy_for(fp32.network, policy)
        reference = Reference(fp32, images, request)
        first = measure_gates(reference, other, max_accuracy_drop=1)
        with (
            patch.object(fp32, "run", side_effect=AssertionError),
            patch.object(fp32, "keep_probability", side_effect=AssertionError),
        ):
            again = measure_gates(reference, other, max_accuracy_drop=1)
    assert again == first
    assert (first.n_images, first.logits_error, first.policy_flips, first.accuracy_drop) == (_N, 0, 0, 0)


def test_differences_are_counted_over_all_batches(tiny: Exported, images: ImageSource) -> None:
    with Orchestrator.open(tiny.bundle) as fp32, Orchestrator.open(tiny.bundle) as other:
        request = parse_policy_for(fp32.network, "all")
        reference = Reference(fp32, images.drawn(90), request)
        run = other.run

        def shifted(batch: np.ndarray, policy: np.ndarray) -> object:
            result = run(batch, policy=policy)
            return dataclasses.replace(result, logits=result.logits + np.float32(0.25))

        with patch.object(other, "run", side_effect=shifted):
            gates = measure_gates(reference, other, max_accuracy_drop=1)
        squares = float((fp32.run(images.take(90).images, policy="all").logits ** 2).sum())
        n_classes = fp32.network.n_classes
    assert gates.n_images == 90
    assert gates.changed_classes == 0
    assert gates.logits_worst == pytest.approx(0.25, rel=1e-5)
    assert gates.logits_error == pytest.approx((90 * n_classes * 0.25**2 / squares) ** 0.5, rel=1e-4)


def test_lost_accuracy_and_flipped_bits_are_counted_over_all_batches(tiny: Exported, images: ImageSource) -> None:
    """The labels are what fp32 says; every second answer is then another class, and a third of the bits flips."""
    with Orchestrator.open(tiny.bundle) as fp32, Orchestrator.open(tiny.bundle) as other:
        run, decide = other.run, other.decide
        labels = run(images.take(_N).images, policy="all").classes
        reference = Reference(fp32, dataclasses.replace(images, labels=labels), parse_policy_for(fp32.network, "all"))

        def wrong_on_even(batch: np.ndarray, policy: np.ndarray) -> object:
            result = run(batch, policy=policy)
            signs = np.where(np.arange(len(batch)) % 2 == 0, -1, 1)[:, None].astype(np.float32)
            return dataclasses.replace(result, logits=signs * result.logits)

        with (
            patch.object(other, "run", side_effect=wrong_on_even),
            patch.object(other, "decide", side_effect=lambda batch: decide(batch) ^ [False, True, False]),
        ):
            gates, strict = (measure_gates(reference, other, max_accuracy_drop=most) for most in (50, 49.9))
    assert (gates.accuracy_fp32, gates.accuracy, gates.accuracy_drop) == (1, 0.5, 50)
    assert (gates.changed_classes, gates.policy_flips) == (0.5, pytest.approx(1 / 3))
    assert (gates.ok, strict.ok) == (True, False)


def test_largest_difference_is_that_of_all_batches(tiny: Exported, images: ImageSource) -> None:
    with Orchestrator.open(tiny.bundle) as fp32, Orchestrator.open(tiny.bundle) as other:
        reference = Reference(fp32, images, parse_policy_for(fp32.network, "all"))
        run, shifts = other.run, iter([0.5, 0.25])

        def shifted(batch: np.ndarray, policy: np.ndarray) -> object:
            result = run(batch, policy=policy)
            return dataclasses.replace(result, logits=result.logits + np.float32(next(shifts)))

        with patch.object(other, "run", side_effect=shifted):
            gates = measure_gates(reference, other, max_accuracy_drop=1)
    assert gates.logits_worst == pytest.approx(0.5, rel=1e-5)


def test_what_there_is_not_is_not_measured(export_random: Callable[..., Exported], images: ImageSource) -> None:
    bundle = export_random("resnet8", shortcut="average-pool", has_policy=False).bundle
    with Orchestrator.open(bundle) as fp32, Orchestrator.open(bundle) as other:
        reference = Reference(fp32, dataclasses.replace(images, labels=None), parse_policy_for(fp32.network, "110"))
        gates = measure_gates(reference, other, max_accuracy_drop=0)
    assert (gates.policy_flips, gates.accuracy_fp32, gates.accuracy, gates.accuracy_drop) == (None, None, None, None)
    assert (gates.n_images, gates.logits_error, gates.ok) == (_N, 0, True)


@pytest.mark.parametrize(("right", "ok"), [(899, True), (895, True), (894, False)])
def test_drop_of_just_the_bound_is_allowed(right: int, ok: bool) -> None:
    """100 x (0.9 - 0.895) is a little more than 0.5."""
    gates = Gates(
        policy="all",
        n_images=1000,
        input_source="pictures",
        logits_error=0.0,
        logits_worst=0.0,
        changed_classes=0.0,
        policy_flips=None,
        accuracy_fp32=0.9,
        accuracy=right / 1000,
        max_accuracy_drop=0.5,
    )
    assert gates.ok is ok

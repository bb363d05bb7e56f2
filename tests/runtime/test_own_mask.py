"""A base that was trained for one mask: it runs where nobody asks for another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bdtool import Orchestrator

_KEEP = np.array([True, False, True])


@pytest.fixture(scope="module")
def tuned(export_random: Callable[..., Any]) -> Any:
    return export_random("resnet8", has_policy=False, mask="101")


@pytest.mark.parametrize(
    ("backend", "strategy"),
    [("onnxruntime", "chain"), ("onnxruntime", "path"), ("onnxruntime", "fused"), ("torch", "chain")],
)
def test_mask_runs_where_no_policy_is_given(
    backend: str,
    strategy: str,
    tuned: Any,
    pixels: Callable[..., np.ndarray],
    preprocessed: Callable[..., np.ndarray],
    torch_logits: Callable[..., np.ndarray],
) -> None:
    with Orchestrator.open(tuned.bundle, backend=backend, strategy=strategy) as runtime:
        result = runtime.run(pixels(tuned.model, 3))
        every = runtime.run(pixels(tuned.model, 3), policy="all")
    keep = np.tile(_KEEP, (3, 1))
    np.testing.assert_array_equal(result.policy, keep)
    expected = torch_logits(tuned.model, preprocessed(tuned.model, 3), keep)
    np.testing.assert_allclose(result.logits, expected, atol=1e-4)
    assert every.policy.all()
    assert np.abs(every.logits - result.logits).max() > 0.01


def test_whole_network_stays_the_baseline(
    tuned: Any,
    pixels: Callable[..., np.ndarray],
    preprocessed: Callable[..., np.ndarray],
    torch_logits: Callable[..., np.ndarray],
) -> None:
    with Orchestrator.open(tuned.bundle, strategy="full") as runtime:
        result = runtime.run(pixels(tuned.model, 2))
    assert result.policy.all()
    expected = torch_logits(tuned.model, preprocessed(tuned.model, 2))
    np.testing.assert_allclose(result.logits, expected, atol=1e-4)


def test_path_of_the_mask_is_joined_when_the_bundle_is_opened(tuned: Any, pixels: Callable[..., np.ndarray]) -> None:
    with Orchestrator.open(tuned.bundle, strategy="path") as runtime:
        result = runtime.run(pixels(tuned.model, 1))
        assert result.hits is not None
        assert result.hits.all()
        assert runtime.path_stats is not None
        assert runtime.path_stats.n_paths == 1

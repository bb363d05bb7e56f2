"""Another threshold of the policy network: every strategy and command keeps what has at least that probability."""

import math
import re

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.data.synthetic import synthetic_images
from bdtool.errors import PolicyError
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.policies import parse_policy, parse_policy_for
from bdtool.runtime.thresholds import threshold_of
from export.bundle import Bundle
from tests.fake_tensorrt import install_gpu

THRESHOLD = 0.62
IMAGES = synthetic_images(16, height=32, width=32)


@pytest.fixture(scope="module")
def expected(tiny):
    """P(keep) of the images, and which of their blocks they keep at `THRESHOLD`."""
    with Orchestrator.open(tiny.bundle) as runtime:
        probability = runtime.keep_probability(IMAGES)
    keep = probability >= THRESHOLD
    assert 0 < keep.sum() < (probability >= 0.5).sum()  # it is another decision
    return probability, keep


STRATEGIES = [("onnxruntime", "chain"), ("onnxruntime", "path"), ("onnxruntime", "fused"), ("torch", "path")]


@pytest.mark.parametrize(("backend", "strategy"), STRATEGIES)
def test_strategies_keep_what_is_as_probable(tiny, expected, backend, strategy):
    _, keep = expected
    with Orchestrator.open(tiny.bundle, backend=backend, strategy=strategy, threshold=THRESHOLD) as runtime:
        learned, given = runtime.run(IMAGES), runtime.run(IMAGES, policy=keep)
        assert runtime.network.threshold == THRESHOLD
    np.testing.assert_array_equal(learned.policy, keep)
    np.testing.assert_allclose(learned.logits, given.logits, atol=1e-5)


@pytest.mark.parametrize("mode", ["policy-cache", "switch", "path-cache", "off"])
def test_cuda_graphs_keep_what_is_as_probable(monkeypatch, tmp_path, tiny, expected, mode):
    install_gpu(monkeypatch, tmp_path)
    options = {"backend": "tensorrt", "device": "cuda:0", "strategy": "graph", "cuda_graph": mode}
    options["paths"] = PathOptions(ahead=[np.array([True, False, True])])
    with Orchestrator.open(tiny.bundle, threshold=THRESHOLD, **options) as runtime:
        policy = np.concatenate([runtime.run(IMAGES[i : i + 1]).policy for i in range(len(IMAGES))])
    np.testing.assert_array_equal(policy, expected[1])


@pytest.mark.parametrize(("threshold", "kept"), [(0, 3), (1, 0)])
def test_the_ends_keep_every_block_or_none(tiny, threshold, kept):
    with Orchestrator.open(tiny.bundle, threshold=threshold) as runtime:
        assert set(runtime.run(IMAGES).blocks_run) == {kept}
        assert set(runtime.decide(IMAGES).sum(axis=1)) == {kept}


def test_bundle_on_disk_stays_as_it_is(tiny):
    opened = Bundle.open(tiny.bundle)
    assert opened.with_threshold(THRESHOLD).network.threshold == THRESHOLD
    assert opened.with_threshold(None).network == opened.network == Bundle.open(tiny.bundle).network


@pytest.mark.parametrize("threshold", [-0.1, 1.5, math.nan, math.inf, "0,7", True, (0.3, 0.7)])
def test_threshold_that_is_no_probability_is_refused(tiny, threshold):
    with pytest.raises(PolicyError, match=rf"threshold {re.escape(repr(threshold))}: expected a threshold from 0 to 1"):
        Orchestrator.open(tiny.bundle, threshold=threshold)


def test_bundle_without_policy_network_has_no_threshold(export_random):
    plain = export_random("resnet8", has_policy=False)
    with pytest.raises(PolicyError, match=r"threshold 0\.7: the bundle has no policy network"):
        Orchestrator.open(plain.bundle, threshold=0.7)


# --- as POLICY --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "threshold"),
    [("learned:0.7", 0.7), (" learned:1 ", 1), ("learned:1e-3", 0.001), ("learned", None), ("first:2", None)],
)
def test_policy_names_its_threshold(policy, threshold):
    assert threshold_of(policy) == threshold
    assert threshold_of(None) is None


@pytest.mark.parametrize("policy", ["learned:", "learned:x", "learned:1.01", "learned:-0.1", "learned:nan"])
def test_policy_with_no_probability_behind_it_is_refused(policy):
    with pytest.raises(PolicyError, match=f"policy '{policy}': expected a threshold from 0 to 1"):
        threshold_of(policy)


def test_name_of_a_learned_policy_can_be_read_again(tiny):
    network = Bundle.open(tiny.bundle).network
    for text, name in (("learned", "learned"), ("learned:0.5", "learned"), ("learned:0.123456789", None)):
        at = network.with_threshold(threshold_of(text))
        request = parse_policy_for(at, text)
        assert request.is_learned
        assert request.name == (name or text)
        assert parse_policy_for(at, request.name).name == parse_policy_for(at, None).name == request.name


def test_threshold_of_another_network_is_refused_with_what_to_do(tiny, expected):
    with Orchestrator.open(tiny.bundle, threshold=THRESHOLD) as runtime:
        with pytest.raises(PolicyError, match=r"opened with the threshold 0\.62\. .* threshold=0\.7, or .* >= 0\.7$"):
            runtime.run(IMAGES, policy="learned:0.7")
        np.testing.assert_array_equal(runtime.run(IMAGES, policy=f"learned:{THRESHOLD}").policy, expected[1])


def test_model_without_policy_network_has_none_to_ask():
    with pytest.raises(PolicyError, match=r"policy 'learned:0\.7': the model has no policy network"):
        parse_policy("learned:0.7", n_blocks=3, has_policy_network=False)

"""Strategy `fused` gives what the chain gives, in one engine call an image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtool import Orchestrator
from bdtool.data.synthetic import synthetic_images
from bdtool.errors import UsageError


@pytest.fixture(scope="module")
def both(tiny):
    with Orchestrator.open(tiny.bundle) as chain, Orchestrator.open(tiny.bundle, strategy="fused") as fused:
        yield chain, fused


@given(keep=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5))
@settings(max_examples=25)
def test_fused_equals_chain_for_any_keep_matrix(both, keep):
    chain, fused = both
    images = synthetic_images(len(keep), height=32, width=32)
    expected, actual = chain.run(images, policy=keep), fused.run(images, policy=keep)
    np.testing.assert_array_equal(actual.policy, expected.policy)
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-4)


def test_learned_policy_decides_the_same(both):
    chain, fused = both
    images = synthetic_images(20, height=32, width=32)
    expected, actual = chain.run(images), fused.run(images)
    np.testing.assert_array_equal(actual.policy, expected.policy)
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-4)
    assert len(np.unique(actual.policy, axis=0)) > 1


def test_timed_orchestrator_sees_the_one_call(both):
    seen, image = [], synthetic_images(1, height=32, width=32)
    with both[1].timed(lambda part, call: lambda: (seen.append(part.name), call())) as timed:
        timed.run(image, policy="101")
    assert seen == ["fused"]


def test_controller_that_decides_on_the_way_is_refused(both):
    class Gate:
        mask = None

    with pytest.raises(UsageError, match="learned policy or given bits"):
        both[1].run_with(synthetic_images(1, height=32, width=32), Gate())

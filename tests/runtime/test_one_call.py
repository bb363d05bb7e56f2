"""Strategy `fused` gives what the chain gives, in one engine call an image."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtool import Orchestrator
from bdtool.data.synthetic import synthetic_images
from bdtool.errors import EngineError, UsageError
from bdtool.runtime.one_call import Force


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


def test_bits_whose_copy_failed_are_copied_again():
    written = []

    class Refuses:
        def write(self, values):
            written.append(values.tolist())
            if len(written) == 2:
                raise EngineError("the device is lost")

    force, first, second = Force(Refuses(), 3), np.array([1, 0, 1], bool), np.array([0, 1, 1], bool)
    force.give(first)
    force.give(first)  # it is there
    with pytest.raises(EngineError):
        force.give(second)
    force.give(second)
    force.give(first)
    assert written == [[1, 2, 1], [2, 1, 1], [2, 1, 1], [1, 2, 1]]


def test_bits_are_copied_again_where_another_copy_failed():
    """Who knows what the buffer holds after that."""
    buffer = SimpleNamespace(write=lambda values: None)
    force, keep = Force(buffer, 3), np.array([1, 0, 1], bool)
    force.give(keep)
    buffer.write = lambda values: 1 / 0
    with pytest.raises(ZeroDivisionError):
        force.give(None)
    written = []
    buffer.write = written.append
    force.give(keep)
    assert len(written) == 1


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

"""Engines that take no batch as small as the one at hand: it is filled up, and nobody sees by what."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bdtool.errors import UsageError

K = 6


@pytest.fixture(scope="module", params=[3, 8])
def least(request):
    return request.param


@pytest.fixture(scope="module")
def opened(fake, least):
    """One runtime for all examples: buffers of earlier batches must leave no trace."""
    return fake(min_batch=least, max_batch=8)


@settings(max_examples=60)
@given(keep=hnp.arrays(bool, st.tuples(st.integers(1, 9), st.just(K))))
def test_no_engine_sees_fewer_images_than_it_takes(opened, least, images_of, fake_oracle, keep):
    opened.backend.calls.clear()
    values = [(7 * i + 5) % 97 for i in range(len(keep))]
    result = opened.runtime.run(images_of(values), policy=keep)
    assert {n for _, n in opened.backend.calls} <= set(range(least, 9))
    assert result.logits[:, 0].tolist() == [fake_oracle(value, row) for value, row in zip(values, keep, strict=True)]
    np.testing.assert_array_equal(result.policy, keep)


def test_blocks_that_nobody_keeps_are_not_run_for_what_was_added(opened, least, images_of):
    opened.backend.calls.clear()
    opened.runtime.run(images_of([1]), policy="100000")
    assert opened.backend.calls == [
        (name, least) for name in ("stem", "block_00", "shortcut_02", "shortcut_04", "head")
    ]


@pytest.mark.parametrize("n_images", [1, 2, 8, 9])
def test_policy_network_decides_as_it_does_without(fake, opened, images_of, n_images):
    images = images_of(range(n_images))
    plain = fake(max_batch=8).runtime
    np.testing.assert_array_equal(opened.runtime.keep_probability(images), plain.keep_probability(images))
    np.testing.assert_array_equal(opened.runtime.run(images).policy, plain.run(images).policy)


def test_whole_network_is_filled_up_too(fake, images_of):
    opened = fake(strategy="full", min_batch=4)
    assert opened.runtime.run(images_of([3, 5])).logits.shape == (2, 2)
    assert opened.backend.calls == [("full", 4)]


def test_path_is_of_single_images(fake):
    with pytest.raises(UsageError, match=r"'path' runs single images, the engines take 2 at least\. Use --strategy ch"):
        fake(strategy="path", min_batch=2)

"""Controllers say who keeps which block; the runtime knows nothing else about policies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from bdtool.errors import EngineError
from bdtool.runtime.controllers import MaskController, all_finite, decisions_from_matrix


def _never():
    pytest.fail("the policy network ran although nobody needs it")


@given(keep=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)))
def test_decisions_say_what_the_matrix_says(keep):
    decisions = decisions_from_matrix(keep)
    assert len(decisions) == keep.shape[1]
    for k, decision in enumerate(decisions):
        np.testing.assert_array_equal(np.broadcast_to(decision, len(keep)), keep[:, k])
        assert isinstance(decision, bool) == (len(set(keep[:, k].tolist())) == 1)


def test_given_bits_need_no_policy_network():
    keep = np.array([[True, False, True], [True, False, False]])
    controller = MaskController(keep, threshold=0.5)
    controller.begin(2, _never)
    assert controller.keep(0) is True
    assert controller.keep(1) is False
    assert controller.keep(2).tolist() == [True, False]
    assert controller.matrix.tolist() == keep.tolist()


@pytest.mark.parametrize(("threshold", "bits"), [(0.5, [0, 1, 1]), (0.7, [0, 0, 1]), (0.0, [1, 1, 1])])
def test_block_is_kept_from_the_threshold_on(threshold, bits):
    controller = MaskController(None, threshold=threshold)
    controller.begin(1, lambda: np.array([[np.nextafter(np.float32(0.5), np.float32(0)), 0.5, 0.7]], np.float64))
    assert controller.matrix.tolist() == [[bool(bit) for bit in bits]]
    assert [controller.keep(k) for k in range(3)] == [bool(bit) for bit in bits]


def test_policy_network_can_run_for_its_cost_alone():
    ran = []

    def probabilities():
        ran.append(True)
        return np.ones((1, 2), np.float32)

    controller = MaskController(np.array([[False, True]]), threshold=0.5, run_policy=True)
    controller.begin(1, probabilities)
    assert ran == [True]
    assert controller.matrix.tolist() == [[False, True]]


@pytest.mark.parametrize("values", [[0.3, np.nan], [0.3, np.inf], [np.inf, -np.inf]])
def test_probabilities_that_are_not_finite_are_refused(values):
    controller = MaskController(None, threshold=0.5)
    with pytest.raises(EngineError, match=r"probabilities are not finite; run `bdtool verify`"):
        controller.begin(1, lambda: np.array([values]))


def test_large_values_are_finite_though_their_sum_is_not():
    assert all_finite(np.full((1, 2), 3e38, np.float32))


def test_image_of_a_batch_is_decided_alone_as_the_batch_is():
    ran = []
    given = MaskController(np.array([[True, False], [False, True]]), threshold=0.5, run_policy=True).for_image(1)
    given.begin(1, lambda: ran.append(True) or np.ones((1, 2), np.float32))
    assert ran == [True]
    assert given.matrix.tolist() == [[False, True]]
    learned = MaskController(None, threshold=0.7).for_image(1)
    learned.begin(1, lambda: np.array([[0.6, 0.8]]))
    assert learned.matrix.tolist() == [[False, True]]


def test_next_batch_is_decided_anew():
    controller, batches = MaskController(None, threshold=0.5), iter([[[0.9, 0.1]], [[0.1, 0.9]]])
    for expected in ([True, False], [False, True]):
        controller.begin(1, lambda: np.array(next(batches)))
        assert [controller.keep(k) for k in range(2)] == expected


def test_matrix_survives_the_buffer_it_came_from():
    buffer = np.array([[0.9, 0.1]], np.float32)
    controller = MaskController(None, threshold=0.5)
    controller.begin(1, lambda: buffer)
    buffer[:] = 0
    assert controller.matrix.tolist() == [[True, False]]

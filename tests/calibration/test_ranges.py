"""Ranges from streamed values: what is kept does not grow with the images, and each method says what it should."""

import numpy as np
import pytest

from bdtool.errors import CalibrationError
from calibration.methods import METHODS
from calibration.ranges import N_BINS, RangeCollector


def _collected(*batches):
    collector = RangeCollector()
    for batch in batches:
        collector.add("x", np.asarray(batch, dtype=np.float32))
    return collector


def test_min_max_is_the_largest_of_all_batches():
    collector = _collected([[1.0, -2.0]], [[0.5, 7.0]], [[-3.0, 0.0]])
    assert collector.range_of("x", method="min-max") == 7.0
    assert collector.n_images("x") == 3


def test_percentile_leaves_rare_values_out():
    values = np.abs(np.random.default_rng(0).normal(size=(100, 1000)))
    values[0, 0] = 50
    found = _collected(values).range_of("x", method="percentile", percentile=99.9)
    assert found == pytest.approx(np.quantile(values, 0.999), abs=50 / (N_BINS / 2))


def test_percentile_is_of_values_of_both_signs():
    values = np.random.default_rng(0).normal(size=(100, 1000))
    values[values < 0] *= 3
    found = _collected(values).range_of("x", method="percentile", percentile=80)
    assert found == pytest.approx(np.quantile(np.abs(values), 0.8), abs=np.abs(values).max() / (N_BINS / 2))


def test_entropy_cuts_a_long_tail():
    values = np.random.default_rng(0).normal(size=(100, 1000))
    values[0, 0] = 30
    found = _collected(values).range_of("x", method="entropy")
    assert 2 < found < 15


@pytest.mark.parametrize("tail", [8.0, 30.0])
def test_mse_is_the_range_that_rounds_best(tail):
    values = np.abs(np.random.default_rng(0).normal(size=(100, 1000))).astype(np.float32)
    values[0, 0] = tail
    found = _collected(values).range_of("x", method="mse")

    def error(largest):
        scale = largest / 127
        return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).mean())

    assert error(found) <= 1.02 * min(error(share * tail) for share in np.linspace(0.05, 1, 400))
    assert error(found) < 0.7 * error(tail)


def test_mse_keeps_the_whole_range_of_even_values():
    found = _collected(np.linspace(-1, 1, 10_000).reshape(100, 100)).range_of("x", method="mse")
    assert found == pytest.approx(1, abs=0.01)


def test_batches_in_any_split_give_nearly_the_same_histogram():
    values = np.random.default_rng(0).normal(size=(64, 500))
    whole, split = _collected(values), _collected(*np.split(values, 8))
    assert len(split.histogram("x").counts) == N_BINS
    assert split.histogram("x").counts.sum() == values.size
    for method in ("min-max", "percentile", "mse"):
        assert split.range_of("x", method=method) == pytest.approx(whole.range_of("x", method=method), rel=0.02)


def test_counts_go_where_the_centre_of_their_bin_lies_as_the_range_grows():
    """The mean of many values stays, to a hundredth of a bin; from the edges it would move by half a bin each time."""
    values = np.random.default_rng(0).uniform(-1, 1, (50, 1000))
    collector = _collected(values, [[3.0]], [[7.0]], [[19.0]])
    found = collector.histogram("x")
    centres = ((np.arange(N_BINS) + 0.5) / N_BINS * 2 - 1) * found.limit
    expected = (values.sum() + 3 + 7 + 19) / (values.size + 3)
    assert (found.counts * centres).sum() / found.counts.sum() == pytest.approx(
        expected, abs=0.2 * found.limit / N_BINS
    )


def test_a_collector_survives_a_file():
    before = _collected([[1.0, -2.0]], [[4.0, 0.0]])
    after = RangeCollector.from_arrays(before.arrays())
    after.add("x", np.array([[5.0]], dtype=np.float32))
    before.add("x", np.array([[5.0]], dtype=np.float32))
    assert np.array_equal(after.histogram("x").counts, before.histogram("x").counts)
    assert after.n_images("x") == 3


def test_nothing_seen_and_nan_are_refused():
    with pytest.raises(CalibrationError, match="no value of 'y' was seen"):
        _collected([[1.0]]).range_of("y", method="min-max")
    with pytest.raises(CalibrationError, match="'x' is not finite"):
        _collected([[float("nan")]])


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'largest'; known: mse, min-max, percentile, entropy"):
        _collected([[1.0]]).range_of("x", method="largest")


def test_no_image_is_counted_of_what_was_not_seen():
    assert _collected([[1.0]]).n_images("y") == 0


@pytest.mark.parametrize("value", [1e-45, 1e-42, 1e-37])
def test_values_too_small_for_a_step_of_int8_count_as_zeros(value):
    assert _collected([[value, -value]]).range_of("x", method="min-max") == 1
    assert _collected([[value, 1.0]]).range_of("x", method="min-max") == 1


@pytest.mark.parametrize("method", METHODS)
def test_zeros_that_came_first_leave_no_trace_in_the_range(method):
    later = np.random.default_rng(0).normal(scale=0.01, size=(8, 100)).astype(np.float32)
    zeros, expected = np.zeros((8, 100), np.float32), RangeCollector()
    expected.add("x", np.concatenate([later, zeros]))
    found = RangeCollector()
    found.add("x", zeros)
    assert found.range_of("x", method=method) == 1
    found.add("x", later)
    assert found.range_of("x", method=method) == pytest.approx(expected.range_of("x", method=method), rel=0.01)

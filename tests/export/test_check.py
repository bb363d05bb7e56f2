"""The measure that decides whether two backends compute the same."""

import numpy as np
import pytest

from bdtool.errors import ExportError
from export.check import Comparison, check_part, compare, compare_outputs


def test_error_is_the_worst_difference_over_the_range():
    result = compare(np.array([0.0, -50.0, 10.0]), np.array([0.0, -50.0, 10.5]), tolerance=0.02)
    assert result.error == pytest.approx(0.5 / 50)
    assert result.ok


def test_small_outputs_are_measured_absolutely():
    assert compare(np.array([1e-3]), np.array([2e-3]), tolerance=1e-5).error == pytest.approx(1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_never_pass(value):
    finite, broken = np.zeros(2), np.array([0.0, value])
    assert not compare(finite, broken, tolerance=1.0).ok
    assert not compare(broken, broken, tolerance=np.finfo(float).max).ok


def test_another_shape_never_passes():
    assert not compare(np.zeros((2, 1)), np.zeros((1, 2)), tolerance=1.0).ok


def test_the_worst_output_counts():
    expected = {"a": np.zeros(2), "b": np.zeros(2)}
    assert compare_outputs(expected, {"a": np.zeros(2), "b": np.ones(2)}, tolerance=0.5).error == 1.0
    broken = np.full(2, np.nan)  # of which `max` would say that it is no larger than another
    assert compare_outputs(expected, {"a": np.zeros(2), "b": broken}, tolerance=0.5).error == np.inf


def test_worst_of_parts_is_the_one_nearest_to_its_own_bound():
    near, far = Comparison(error=1e-6, tolerance=1e-6), Comparison(error=1e-3, tolerance=1e-2)
    broken, exact = Comparison(error=np.nan, tolerance=1.0), Comparison(error=0.0, tolerance=0.0)
    shares = [one.share_of_bound for one in (near, far, broken, exact, Comparison(error=1e-9, tolerance=0.0))]
    assert shares == [1.0, pytest.approx(0.1), np.inf, 0.0, np.inf]


def test_check_part_names_the_part_and_both_errors(tiny):
    model = (tiny.bundle / "onnx" / "head.onnx").read_bytes()
    feeds = {"x": np.ones((2, 64, 8, 8), np.float32)}
    with pytest.raises(ExportError, match=r"part 'head'.*by .* of the output's range, fp32 allows 1e-05"):
        check_part("head", model, feeds, {"logits": np.full((2, 10), 1e3, np.float32)})

"""Figures of a profile against numpy and against values worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bdtool.profiling.statistics import Samples, pooled_variation


def _samples(latency_ms, blocks_run=None, batch=1):
    latency_ms = np.array(latency_ms, dtype=np.float64)
    blocks = np.full(len(latency_ms), 3.0) if blocks_run is None else np.array(blocks_run, dtype=np.float64)
    return Samples(latency_ms=latency_ms, blocks_run=blocks, flops=10 * blocks, batch=batch)


def test_summary_of_one_to_hundred_is_known():
    summary = _samples(np.arange(1, 101)).summary((50, 90, 99))
    assert summary == pytest.approx(
        {"min": 1, "mean": 50.5, "median": 50.5, "p50": 50.5, "p90": 90.1, "p99": 99.01, "max": 100}
    )
    assert list(summary) == ["min", "mean", "median", "p50", "p90", "p99", "max"]


def test_summary_equals_numpy():
    latency = np.random.default_rng(0).lognormal(size=999)
    summary = _samples(latency).summary((12.5, 95))
    assert summary["p12.5"] == np.percentile(latency, 12.5)
    assert summary["p95"] == np.percentile(latency, 95)
    assert (summary["mean"], summary["median"]) == (latency.mean(), np.median(latency))


@pytest.mark.parametrize(
    ("n_requests", "held"),
    [
        (1, {"p0", "p100"}),
        (2, {"p0", "p50", "p100"}),
        (10, {"p0", "p50", "p90", "p100"}),
        (19, {"p0", "p50", "p90", "p100"}),
        (20, {"p0", "p50", "p90", "p95", "p100"}),
        (99, {"p0", "p50", "p90", "p95", "p100"}),
        (100, {"p0", "p1", "p50", "p90", "p95", "p99", "p100"}),
    ],
)
def test_percentiles_that_the_requests_do_not_hold_are_none(n_requests, held):
    summary = _samples(np.arange(n_requests)).summary((0, 1, 50, 90, 95, 99, 100))
    assert {name for name, value in summary.items() if name[0] == "p" and value is not None} == held
    assert (summary["p0"], summary["p100"]) == (summary["min"], summary["max"])


def test_percentiles_keep_their_digits():
    summary = _samples(np.arange(100)).summary((99.99999, 100, 0.1))
    assert list(summary) == ["min", "mean", "median", "p99.99999", "p100", "p0.1", "max"]


def test_throughput_counts_the_images_of_a_request():
    assert _samples([2, 4, 6]).throughput_ips == 250
    assert _samples([2, 4, 6], batch=8).throughput_ips == 2000


def test_variation_of_equal_work_is_standard_deviation_over_mean():
    latency = np.array([9.0, 10.0, 11.0, 10.5])
    assert _samples(latency).variation == pytest.approx(latency.std(ddof=1) / latency.mean())


def test_different_work_is_no_variation():
    assert _samples([1, 1, 5, 5], [1, 1, 9, 9]).variation == 0


def test_deviations_are_pooled_over_groups_of_equal_work():
    # deviations -1, 1 about 5 and -2, 0, 2 about 10: squares 2 + 8, freedom 1 + 2; the mean of all is 8
    assert _samples([4, 6, 8, 10, 12], [1, 1, 2, 2, 2]).variation == pytest.approx(math.sqrt(10 / 3) / 8)


def test_single_requests_give_no_variation():
    samples = _samples([1, 2, 3], [1, 2, 3])
    assert math.isnan(samples.variation)
    assert samples.to_json(samples, (90,))["coefficient_of_variation"] is None


def test_times_of_zero_have_no_variation():
    assert math.isnan(pooled_variation(np.zeros(3), np.ones(3)))


def test_typical_latency_is_the_mean_of_the_medians_of_equal_work():
    # medians 5 of three requests and 10 of two
    assert _samples([4, 5, 90, 9, 11], [1, 1, 1, 2, 2]).typical_ms == pytest.approx((3 * 5 + 2 * 10) / 5)


def test_trimmed_mean_leaves_out_the_slowest_of_20_requests_of_equal_work():
    # of 40 the two slowest, of 19 none
    assert _samples([2] * 38 + [50, 60] + [4] * 18 + [23], [1] * 40 + [2] * 19).trimmed_mean_ms == pytest.approx(
        (40 * 2 + 19 * 5) / 59
    )


def test_spread_is_between_the_quartiles_of_equal_work():
    # quartiles 2 and 4 about 3, of five requests, and 17.5 and 32.5 about 25, of four; three requests have none
    latency, blocks = [1, 2, 3, 4, 5, 10, 20, 30, 40, 1, 50, 99], [1] * 5 + [2] * 4 + [3] * 3
    assert _samples(latency, blocks).spread == pytest.approx((5 * 2 + 4 * 15) / (5 * 3 + 4 * 25))


def test_ratios_are_to_the_baseline():
    full = _samples([10, 10, 30], [6, 6, 6])
    data = _samples([4, 5, 16], [3, 3, 3]).to_json(full, (90,))
    assert (data["ratio_to_full"], data["flops_ratio_to_full"]) == (0.5, 0.5)
    assert (data["blocks_mean"], data["n_requests"]) == (3, 3)
    assert full.to_json(full, ())["ratio_to_full"] == 1


def test_ratio_is_that_of_rounds_and_lies_between_their_quartiles():
    """In the second round the machine was three times as slow, and one took twice as many requests there."""
    full = _rounds([10, 10, 30, 30, 10, 10], [0, 0, 1, 1, 2, 2])
    mine = _rounds([5, 15, 15, 15, 5], [0, 1, 1, 1, 2])
    data = mine.to_json(full, ())
    assert (data["ratio_to_full"], data["ratio_to_full_iqr"]) == (0.5, [0.5, 0.5])
    assert mine.latency_ms.mean() / full.latency_ms.mean() > 0.65


def test_a_round_that_was_disturbed_leaves_the_ratio():
    full, mine = _rounds([10, 10, 10], [0, 1, 2]), _rounds([5, 90, 6], [0, 1, 2])
    assert mine.ratio_to(full) == pytest.approx(0.6)  # the mean over rounds is 3.4


def test_ratio_of_rounds_that_do_not_match_is_that_of_means():
    mine = _rounds([5, 5, 20], [0, 0, 1])
    for full in (_rounds([10, 20, 30], [0, 1, 2]), _samples([10, 20, 30])):
        assert mine.ratio_to(full) == full.ratio_to(mine) ** -1 == 0.5
        assert mine.ratio_iqr(full) is full.ratio_iqr(mine) is None


def test_regimes_of_a_busy_machine_leave_the_ratio():
    """Every request takes half the time of `full`; slow ones take five times as long, of `full` more of them."""
    full = _rounds(2 * [10, 10, 50, 50, 50], [0] * 5 + [1] * 5)
    mine = _rounds(2 * [5, 5, 5, 25, 25], [0] * 5 + [1] * 5)
    assert mine.median_ms / full.median_ms == 0.1
    assert mine.ratio_to(full) == pytest.approx(65 / 170)


def test_ratio_of_a_mixture_is_that_of_its_mean():
    """Three of five images keep few blocks; the median would be theirs alone."""
    full, mine = _rounds([10] * 5, [0] * 5), _rounds([2, 2, 2, 8, 8], [0] * 5)
    assert mine.ratio_to(full) == pytest.approx(0.44)


def _rounds(latency_ms, rounds):
    return replace(_samples(latency_ms), rounds=np.array(rounds))


def test_spread_of_the_ratio_is_over_rounds():
    full = _rounds([10, 10, 20, 20, 10, 10, 10, 10], [0, 0, 1, 1, 2, 2, 3, 3])
    mine = _rounds([4, 6, 4, 6, 4, 6, 1, 15], [0, 0, 1, 1, 2, 2, 3, 3])
    # means 5, 5, 5, 8 over 10, 20, 10, 10: ratios 0.25, 0.5, 0.5, 0.8
    assert mine.ratio_iqr(full) == pytest.approx([0.4375, 0.575])
    assert mine.median_ms_iqr() == pytest.approx([5, 5.75])
    data = mine.to_json(full, ())
    assert data["ratio_to_full_iqr"] == mine.ratio_iqr(full)


def test_samples_without_rounds_have_no_spread():
    samples = _samples([1, 2, 3])
    assert samples.ratio_iqr(samples) is None
    assert samples.to_json(samples, ())["median_ms_iqr"] is None


def test_hit_rate_is_the_mean_over_requests():
    assert replace(_samples([1, 1]), hits=np.array([1.0, 0.5])).hit_rate == 0.75
    assert _samples([1, 1]).hit_rate is None

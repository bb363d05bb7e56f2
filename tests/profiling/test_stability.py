"""Ratios of a run with two regimes are not to be trusted; ordinary noise leaves them alone."""

import numpy as np
import pytest

from bdtool.profiling.stability import find_instability, stability_warnings
from bdtool.profiling.statistics import Samples


def _samples(latency_ms, blocks_run=None, hits=None):
    latency_ms = np.array(latency_ms, dtype=np.float64)
    blocks = np.full(len(latency_ms), 3.0) if blocks_run is None else np.array(blocks_run, dtype=np.float64)
    rounds = np.arange(len(latency_ms)) // 50
    return Samples(latency_ms=latency_ms, blocks_run=blocks, flops=blocks, batch=1, rounds=rounds, hits=hits)


def _noisy(ms, n_requests=400, *, seed=0, deviation=0.1, slow_share=0.01, slowdown=10):
    """Requests of about that many milliseconds, of which a few are slow, as on any machine."""
    random = np.random.default_rng([seed, int(1000 * ms)])
    latency = ms * random.normal(1, deviation, n_requests)
    return np.where(random.random(n_requests) < slow_share, slowdown * latency, latency)


def _varying(deviation):
    return _samples([10 - deviation, 10 + deviation] * 50)


def test_variation_above_two_and_a_half_percent_is_a_warning():
    assert stability_warnings({"full": _varying(0.24)}) == []
    [warning] = stability_warnings({"full": _varying(0.24), "shaky": _varying(0.26), "worse": _varying(1)})
    assert warning.startswith("coefficient of variation above 2.5%: shaky 2.6%, worse 10.1%; the machine is busy")


@pytest.mark.parametrize("n_requests", [200, 1000])
def test_ordinary_noise_and_single_slow_requests_are_trusted(n_requests):
    for seed in range(20):
        full, chain = (_samples(_noisy(ms, n_requests, seed=seed, slow_share=0.02)) for ms in (10, 4))
        assert full.variation > 0.3
        assert find_instability({"full": full, "chain": chain}) == []


@pytest.mark.parametrize("slowdown", [2, 5])
def test_two_regimes_are_not_trusted(slowdown):
    full = _samples(_noisy(10, slow_share=0.55, slowdown=slowdown))
    chain = _samples(_noisy(4, slow_share=0.45, slowdown=slowdown))
    reasons = find_instability({"full": full, "chain": chain})
    assert [reason.split(":")[0] for reason in reasons] == ["full", "chain"]
    assert "quartiles of equal work lie" in reasons[0]


def test_means_and_medians_that_disagree_are_not_trusted():
    """`full` is slow throughout, one request of five of the chain is fast: few enough to leave its quartiles."""
    full, chain = _samples(_noisy(20)), _samples(_noisy(12, slow_share=0.2, slowdown=0.05))
    [reason] = find_instability({"full": full, "chain": chain})
    assert reason.startswith("chain: 0.4")
    assert " of `full` by means without the slowest 5 %, 0.5" in reason


def test_one_slow_request_of_five_is_not_trusted():
    full, chain = _samples(_noisy(20)), _samples(_noisy(8, slow_share=0.2, slowdown=3))
    [reason] = find_instability({"full": full, "chain": chain})
    assert reason.startswith("chain: 0.5")
    assert " of `full` by means without the slowest 5 %, 0.4" in reason


def test_images_that_run_different_blocks_are_trusted():
    """The median is the cheap images' alone; that is no noise."""
    blocks = np.where(np.random.default_rng(0).random(400) < 0.6, 4, 12)
    chain = _samples(_noisy(1) * blocks, blocks)
    assert find_instability({"full": _samples(_noisy(15)), "chain": chain}) == []


@pytest.mark.parametrize(("hit_ms", "miss_ms", "hit_rate"), [(0.25, 0.4, 0.7), (0.25, 1.5, 0.95)])
def test_images_that_miss_the_path_cache_are_trusted(hit_ms, miss_ms, hit_rate):
    """They run as many blocks in another time; that is no noise either."""
    hits = (np.random.default_rng(0).random(400) < hit_rate).astype(float)
    path = _samples(np.where(hits, _noisy(hit_ms), _noisy(miss_ms)), hits=hits)
    assert find_instability({"full": _samples(_noisy(1)), "path": path}) == []


def test_unstable_run_is_one_warning():
    full, chain = _samples(_noisy(10, slow_share=0.55)), _samples(_noisy(4, slow_share=0.45))
    [warning] = stability_warnings({"full": full, "chain": chain})
    assert warning.startswith("UNSTABLE, ratios to `full` are not to be trusted: full: ")
    assert warning.endswith("measure again when nothing else runs")


def test_few_requests_are_not_judged_by_their_quartiles():
    assert find_instability({"full": _samples([10, 30, 10])}) == []

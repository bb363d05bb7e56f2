"""The line of latency against blocks run recovers what it was made from, and asks for more points where it has few."""

import time
from dataclasses import replace

import numpy as np
import pytest

from bdtool.profiling.line import FROM_WORKLOAD, fit_line, fit_lines
from bdtool.profiling.measure import measure
from bdtool.profiling.statistics import Samples
from bdtool.profiling.workload import Settings, Workload, is_static
from bdtool.runtime.result import RunResult
from export.bundle import Bundle

FIXED_MS, BLOCK_MS, FULL_MS = 2.0, 0.5, 5.0


def _samples(blocks, latency):
    blocks = np.array(blocks, dtype=np.float64)
    return Samples(latency_ms=np.array(latency, dtype=np.float64), blocks_run=blocks, flops=blocks, batch=1)


def _on_the_line(counts, n=3):
    blocks = np.repeat(counts, n)
    return _samples(blocks, FIXED_MS + BLOCK_MS * blocks)


def test_points_on_a_line_give_the_line():
    line = fit_line(_on_the_line([0, 4, 7, 9]), FULL_MS)
    assert (line.fixed_ms, line.per_block_ms) == pytest.approx((FIXED_MS, BLOCK_MS))
    assert line.break_even_blocks == pytest.approx((FULL_MS - FIXED_MS) / BLOCK_MS)
    assert line.latency_ms(4) == pytest.approx(FIXED_MS + 4 * BLOCK_MS)
    assert line.r_squared == pytest.approx(1)
    assert (line.n_counts, line.n_requests, line.points) == (4, 12, FROM_WORKLOAD)


def test_r_squared_is_of_the_medians():
    # medians 0, 3, 0 at 0, 1, 2: the flat line through 1 explains nothing
    line = fit_line(_samples(np.repeat([0, 1, 2], 3), [0, 0, 9, 3, 3, 3, 0, 0, 0]), 1)
    assert (line.fixed_ms, line.per_block_ms, line.r_squared) == pytest.approx((1, 0, 0), abs=1e-12)
    # medians 0, 1, 1: the line 1/6, 4/6, 7/6 leaves 1/6 of 2/3
    line = fit_line(_samples(np.repeat([0, 1, 2], 3), np.repeat([0, 1, 1], 3)), 1)
    assert (line.fixed_ms, line.per_block_ms, line.r_squared) == pytest.approx((1 / 6, 1 / 2, 3 / 4))


def test_medians_weigh_as_many_requests_as_they_stand_for():
    # medians 0, 3, 0 of 3, 12 and 3 requests: the flat line through their mean
    line = fit_line(_samples(np.repeat([0, 1, 2], [3, 12, 3]), np.repeat([0, 3, 0], [3, 12, 3])), 1)
    assert (line.fixed_ms, line.per_block_ms, line.r_squared) == pytest.approx((12 * 3 / 18, 0, 0), abs=1e-12)


def test_slow_requests_do_not_tilt_the_line():
    samples = _on_the_line([0, 1, 2, 3], n=5)
    samples.latency_ms[0] = 1000
    assert fit_line(samples, FULL_MS).per_block_ms == pytest.approx(BLOCK_MS)


def test_two_numbers_of_blocks_are_no_line():
    assert fit_line(_on_the_line([3, 9]), FULL_MS) is None
    assert fit_line(_on_the_line([3, 6, 9], n=2), FULL_MS) is None


@pytest.mark.parametrize(
    ("batch", "n_blocks", "there"),
    [(1, 0, True), (1, 20, True), (1, 21, False), (2, 0, True), (2, 15, True), (2, 16, False)],
)
def test_numbers_of_blocks_that_lie_close_together_are_no_line(batch, n_blocks, there):
    """They lie within five blocks of each other."""
    samples = replace(_on_the_line([4.5, 7, 8.25, 9.5]), batch=batch)
    assert (fit_line(samples, FULL_MS, n_blocks=n_blocks) is not None) == there


def test_single_requests_far_off_do_not_widen_the_span():
    samples = _on_the_line([0, *[7] * 3, *[8] * 3, *[9] * 3, 15], n=1)
    assert fit_line(samples, FULL_MS, n_blocks=15) is None


def test_missed_requests_of_path_are_left_out():
    samples = _on_the_line([0, 4, 8], n=4)
    hits = np.tile([1.0, 1.0, 1.0, 0.0], 3)
    samples.latency_ms[3::4] = 100
    assert fit_line(replace(samples, hits=hits), FULL_MS).n_requests == 9
    assert fit_line(replace(samples, hits=hits), FULL_MS).r_squared == pytest.approx(1)


def test_nothing_is_explained_where_every_number_of_blocks_takes_as_long():
    assert fit_line(_samples(np.repeat([0, 1, 2], 3), [2.0] * 9), 1).r_squared is None


def test_free_blocks_never_break_even():
    assert fit_line(_samples(np.repeat([0, 1, 2], 3), np.repeat([3, 2, 1], 3)), 1).break_even_blocks is None


class _Clocked:
    """A runtime whose clock moves by a known time for each request; `factor` times that of FP32."""

    def __init__(self, network, clock, *, is_full, factor=1.0):
        self.network, self._clock, self._is_full, self.factor, self.closed = network, clock, is_full, factor, False

    def run(self, images, policy=None):
        keep = np.ones((len(images), self.network.n_blocks), dtype=bool) if policy is None else policy
        ms = FULL_MS if self._is_full else FIXED_MS + BLOCK_MS * keep.sum(axis=1).mean()
        self._clock[0] += self.factor * ms / 1000
        return RunResult(logits=np.zeros((len(images), 10)), policy=keep)

    def run_with_policy_cost(self, images, policy):
        return self.run(images, policy)

    def timed(self, wrap, *, paths=None):
        self.masks = [mask.tolist() for mask in paths.ahead]
        return self

    def close(self):
        self.closed = True


@pytest.fixture
def clocked(tiny, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return _runtimes(tiny, clock, {"full": 1, "chain": 1})


@pytest.fixture
def both_precisions(tiny, monkeypatch):
    """INT8 takes a third of the time of FP32, `full` half of it."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return _runtimes(tiny, clock, {"full": 1, "full@int8": 1 / 2, "chain": 1, "chain@int8": 1 / 3})


def _runtimes(tiny, clock, factors):
    network = Bundle.open(tiny.bundle).network
    return {name: _Clocked(network, clock, is_full=is_static(name), factor=factor) for name, factor in factors.items()}


FIXED = Workload(images=np.zeros((6, 32, 32, 3), np.uint8), keep=np.tile([True, False, True], (6, 1)))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fixed_policy_is_measured_at_extra_points(clocked, batch):
    settings, workload = Settings(batch=batch, warmup_ms=0, duration_s=0.1), FIXED
    lines = fit_lines(clocked, measure(clocked, workload, settings), workload, settings)
    assert list(lines) == ["chain"]
    line = lines["chain"]
    assert (line.fixed_ms, line.per_block_ms, line.r_squared) == pytest.approx((FIXED_MS, BLOCK_MS, 1))
    assert line.break_even_blocks == pytest.approx(6)
    assert "extra points" in line.points
    assert "distribute:0,1,2,3" in line.points
    assert [sum(mask) for mask in clocked["chain"].masks] == [0, 1, 2, 3]  # a path strategy would join these
    assert clocked["chain"].closed


def test_points_are_compared_with_full_of_the_same_rounds(clocked):
    settings = Settings(warmup_ms=0, duration_s=0.1)
    samples = measure(clocked, FIXED, settings)
    for runtime in clocked.values():
        runtime.factor = 3  # the clock of the machine changes
    line = fit_lines(clocked, samples, FIXED, settings)["chain"]
    assert (line.fixed_ms, line.break_even_blocks) == pytest.approx((3 * FIXED_MS, 6))


class _Missing(_Clocked):
    """A `path` strategy of which every third request misses, and takes long."""

    n_requests = 0

    def run(self, images, policy=None):
        self.n_requests += 1
        hit = self.n_requests % 3 > 0
        self._clock[0] += 0 if hit else 0.005
        return replace(super().run(images, policy), hits=np.full(len(images), hit))


def test_missed_requests_at_extra_points_are_left_out(clocked):
    full, settings = clocked["full"], Settings(warmup_ms=0, duration_s=3)
    runtimes = {"full": full, "path": _Missing(full.network, full._clock, is_full=False)}
    line = fit_lines(runtimes, measure(runtimes, FIXED, settings), FIXED, settings)["path"]
    n_rounds, n_counts, n_images = 6, 4, 20
    n_measured = n_rounds * n_counts * n_images
    assert n_measured / 2 < line.n_requests < 3 * n_measured / 4
    assert (line.fixed_ms, line.per_block_ms, line.r_squared) == pytest.approx((FIXED_MS, BLOCK_MS, 1))


@pytest.mark.parametrize("keep", [FIXED.keep, np.tril(np.ones((6, 3), dtype=bool), -1)], ids=["points", "workload"])
def test_a_precision_breaks_even_with_full_in_that_precision(both_precisions, keep):
    settings, workload = Settings(warmup_ms=0, duration_s=0.1), replace(FIXED, keep=keep)
    samples = measure(both_precisions, workload, settings)
    lines = fit_lines(both_precisions, samples, workload, settings)
    assert {name: line.against for name, line in lines.items()} == {"chain": "full", "chain@int8": "full@int8"}
    # INT8: (5 / 2 - 2 / 3) / (0.5 / 3)
    assert [line.break_even_blocks for line in lines.values()] == pytest.approx([6, 11])
    del both_precisions["full@int8"]
    alone = fit_lines(both_precisions, samples, workload, settings)["chain@int8"]
    assert (alone.against, alone.break_even_blocks) == ("full", pytest.approx((5 - 2 / 3) / (0.5 / 3)))


@pytest.mark.parametrize("batch", [1, 2])
def test_requests_longer_than_the_duration_get_the_fewest_points(clocked, batch):
    settings = Settings(batch=batch, warmup_ms=0, duration_s=0.01)
    samples, before = measure(clocked, FIXED, settings), time.perf_counter()
    line = fit_lines(clocked, samples, FIXED, settings)["chain"]
    assert (line.n_counts, line.fixed_ms, line.per_block_ms) == pytest.approx((3, FIXED_MS, BLOCK_MS))
    # 0, 2 and 3 blocks and `full`: a warm-up, and two rounds of as many as 20 ms hold and one before them
    together_ms = 3 * FIXED_MS + 5 * BLOCK_MS + FULL_MS
    n_requests = int(4 * 20 / together_ms)
    assert (time.perf_counter() - before) * 1000 == pytest.approx((1 + 2 * (1 + n_requests)) * together_ms)


def test_a_long_duration_has_six_rounds_of_20_images(clocked):
    settings = Settings(warmup_ms=0, duration_s=3)
    line = fit_lines(clocked, measure(clocked, FIXED, settings), FIXED, settings)["chain"]
    assert (line.n_counts, line.n_requests) == (4, 4 * 6 * 20)


@pytest.mark.parametrize(("duration_s", "n_rounds"), [(0.31, 6), (0.29, 2)])
def test_the_rounds_of_points_follow_from_the_duration(clocked, duration_s, n_rounds):
    """Sixty requests to `full` are 0.3 s; a round of a point takes its share of that, or at least 20 ms."""
    settings = Settings(warmup_ms=0, duration_s=duration_s)
    line = fit_lines(clocked, measure(clocked, FIXED, settings), FIXED, settings)["chain"]
    share_s = max(0.02, duration_s / 4 / n_rounds)
    mean_s = (FULL_MS + 4 * FIXED_MS + (0 + 1 + 2 + 3) * BLOCK_MS) / 5 / 1000
    assert line.n_requests == 4 * n_rounds * int(share_s / mean_s)


def test_batches_whose_means_hardly_vary_are_measured_at_extra_points(clocked):
    settings = Settings(batch=8, warmup_ms=0, duration_s=0.1)
    keep = np.tril(np.ones((4, 3), dtype=bool), -1)  # 0 to 3 blocks
    keep = np.concatenate([keep, keep, keep, keep[[1] * 4], keep, keep[[2] * 4]])  # means 1.5, 1.25, 1.75
    workload = Workload(images=np.zeros((24, 32, 32, 3), np.uint8), keep=keep)
    samples = measure(clocked, workload, settings)
    assert len(set(samples["chain"].blocks_run)) == 3
    line = fit_lines(clocked, samples, workload, settings)["chain"]
    assert "distribute:0,1,2,3" in line.points


def test_a_workload_that_varies_needs_no_extra_points(clocked):
    settings = Settings(warmup_ms=0, duration_s=1e-9)
    keep = np.tril(np.ones((4, 3), dtype=bool), -1)
    workload = Workload(images=np.zeros((4, 32, 32, 3), np.uint8), keep=keep)
    lines = fit_lines(clocked, measure(clocked, workload, settings), workload, settings)
    assert lines["chain"].points == FROM_WORKLOAD
    assert lines["chain"].n_counts == 4
    assert lines["chain"].per_block_ms == pytest.approx(BLOCK_MS)

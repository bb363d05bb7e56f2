"""Strategies take turns on the same requests; given bits still pay for the policy network."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from bdtool.data.sources import open_data
from bdtool.errors import PolicyError, UsageError
from bdtool.profiling import measure as measuring
from bdtool.profiling.instrumented import run_instrumented
from bdtool.profiling.measure import measure
from bdtool.profiling.profile import profile
from bdtool.profiling.workload import Settings, Workload
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from bdtool.runtime.result import RunResult
from engines.fake import FakeBackend
from export.bundle import Bundle

SHORT = Settings(warmup_ms=0, duration_s=1e-9)  # as few rounds as there may be
WARM = replace(SHORT, warmup_ms=1e-9)  # the least that is no zero
N_ROUNDS = 4
SETTLING = 3


@pytest.fixture
def network(tiny):
    return Bundle.open(tiny.bundle).network


class _Recorder:
    """A runtime that notes who ran which images; images are told apart by their first pixel."""

    def __init__(self, name, network, log):
        self.name, self.network, self.log = name, network, log

    def run(self, images, policy=None):
        self.log.append((self.name, images[:, 0, 0, 0].tolist()))
        return RunResult(logits=np.zeros((len(images), 10)), policy=np.ones((len(images), 3), dtype=bool))

    def run_with_policy_cost(self, images, policy):
        self.run(images)
        return RunResult(logits=np.zeros((len(images), 10)), policy=policy)


def _images(n):
    return np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 32, 32, 3)).copy()


def _rounds(log):
    """Return the log cut where the runtime changes: [(name, [images of each request])]."""
    rounds = []
    for name, images in log:
        if not rounds or rounds[-1][0] != name:
            rounds.append((name, []))
        rounds[-1][1].append(images)
    return rounds


@pytest.fixture
def recorded(network):
    """Return a function that measures two recorders and gives the samples and the log after the warm-up."""

    def run(*, n_images=8, keep=None, settings=SHORT):
        log = []
        runtimes = {name: _Recorder(name, network, log) for name in ("full", "chain")}
        samples = measure(runtimes, Workload(images=_images(n_images), keep=keep), settings)
        n_warm = 2
        if settings.warmup_ms > 0:
            n_warm *= min(math.ceil(n_images / settings.batch), max(2, measuring.ROUND_IMAGES // settings.batch))
        return samples, log[n_warm:], log[:n_warm]

    return run


def test_strategies_take_turns_and_swap_who_is_first(recorded):
    _, log, _ = recorded()
    # the last of one round is the first of the next: rounds of both orders, run together
    assert [name for name, _ in _rounds(log)] == ["full", "chain", "full", "chain", "full"]
    lengths = [len(requests) for _, requests in _rounds(log)]
    one = measuring.ROUND_IMAGES + SETTLING
    assert lengths == [one, 2 * one, 2 * one, 2 * one, one]


def test_all_strategies_get_the_same_requests(recorded):
    _, log, warm = recorded(n_images=7, settings=Settings(batch=2, warmup_ms=0, duration_s=1e-9))
    for part in (log, warm):
        chain, full = ([images for name, images in part if name == wanted] for wanted in ("chain", "full"))
        assert chain == full
        assert {len(images) for images in chain} == {2}


def test_a_round_of_images_is_touched_before_the_measurement(recorded):
    _, _, warm = recorded(n_images=20, settings=WARM)
    assert {images[0] for name, images in warm if name == "chain"} == set(range(20))


def test_no_warm_up_is_a_request_of_each(recorded):
    _, log, warm = recorded(n_images=20)
    assert warm == [("full", [0]), ("chain", [0])]
    assert len(log) == 2 * N_ROUNDS * (measuring.ROUND_IMAGES + SETTLING)


def test_warm_up_is_a_round_of_images_whatever_the_batch(network):
    log = []
    runtimes = {"full": _Recorder("full", network, log)}
    measure(runtimes, Workload(images=_images(200), keep=None), replace(WARM, batch=25))
    counted = N_ROUNDS * 2 * 2  # of two requests, which settle first
    assert [len(images) for _, images in log] == [25] * (2 + counted)


def test_settling_requests_are_not_counted(recorded):
    samples, log, _ = recorded()
    assert len(samples["chain"].latency_ms) == len(samples["full"].latency_ms) == N_ROUNDS * measuring.ROUND_IMAGES
    assert len(log) == 2 * N_ROUNDS * (measuring.ROUND_IMAGES + SETTLING)
    assert np.bincount(samples["chain"].rounds).tolist() == [measuring.ROUND_IMAGES] * N_ROUNDS


def test_small_data_sets_start_again_from_the_first_image():
    images, keep = Workload(images=_images(3), keep=np.eye(3, dtype=bool)).request(1, 2)
    assert images[:, 0, 0, 0].tolist() == [2, 0]
    assert keep.tolist() == [[False, False, True], [True, False, False]]


@pytest.mark.parametrize(("n_images", "batch", "n_requests"), [(100, 64, 2), (128, 64, 2), (7, 2, 4), (3, 64, 1)])
def test_requests_hold_every_image(n_images, batch, n_requests):
    requests = Workload(images=_images(n_images), keep=None).requests(batch)
    assert len(requests) == n_requests
    assert all(len(images) == batch for images, _ in requests)
    assert {image for images, _ in requests for image in images[:, 0, 0, 0].tolist()} == set(range(n_images))


def test_warm_up_goes_on_for_its_time(network, monkeypatch):
    clock = itertools.count()  # each look at the clock is a millisecond later
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock) / 1000)
    log = []
    runtimes = {"full": _Recorder("full", network, log)}
    settings = Settings(warmup_ms=200, duration_s=0.4)
    samples = measure(runtimes, Workload(images=_images(4), keep=None), settings)
    n_rounds = samples["full"].rounds[-1] + 1
    assert len(log) - n_rounds * (measuring.ROUND_IMAGES + SETTLING) == pytest.approx(200, abs=1)


def test_measuring_goes_on_for_the_duration(network, monkeypatch):
    clock = itertools.count()  # each look at the clock is a millisecond later
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock) / 1000)
    runtimes = {name: _Recorder(name, network, []) for name in ("full", "chain")}
    shares = []
    settings = Settings(warmup_ms=0, duration_s=0.29)
    samples = measure(runtimes, Workload(images=_images(4), keep=None), settings, on_round=shares.append)
    assert samples["chain"].latency_ms.sum() == pytest.approx(300)
    assert shares == sorted(shares)
    assert shares[-1] == 1


class _Clocked:
    """A runtime whose clock moves by `seconds` for each request."""

    def __init__(self, network, clock, seconds):
        self.network, self._clock, self._seconds, self.n_requests = network, clock, seconds, 0

    def run(self, images, policy=None):
        self._clock[0] += self._seconds
        self.n_requests += 1
        return RunResult(logits=np.zeros((len(images), 10)), policy=np.ones((len(images), 3), dtype=bool))


@pytest.fixture
def rounds_of(network, monkeypatch):
    """Return a function that gives the counted requests of each round, and the seconds of the whole run."""

    def run(request_s, n_images=60, **settings):
        clock = [0.0]
        monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
        runtimes = {name: _Clocked(network, clock, request_s) for name in ("full", "chain")}
        samples = measure(runtimes, Workload(images=_images(n_images), keep=None), Settings(**settings))
        return np.bincount(samples["chain"].rounds).tolist(), clock[0]

    return run


@pytest.mark.parametrize(
    ("request_s", "batch", "n_requests"),
    [(0.0149, 1, 50), (0.0151, 1, 49), (0.0751, 1, 9), (0.2, 1, 5), (0.2, 2, 3), (0.4, 3, 2), (0.01, 64, 2)],
)
def test_a_round_takes_its_share_of_the_duration(rounds_of, request_s, batch, n_requests):
    """A quarter of three seconds holds 50 images of 15 ms; five of them are run however long they take."""
    rounds, _ = rounds_of(request_s, batch=batch, duration_s=3)
    assert set(rounds) == {n_requests}


def test_the_shortest_run_is_four_rounds_of_five_images(rounds_of):
    rounds, seconds = rounds_of(1, warmup_ms=0, duration_s=0.1)
    assert rounds == [5] * 4
    assert seconds == 2 * (1 + 4 * (1 + 5))  # of each a warm-up, and a request at the start of each round


def test_slow_images_are_warmed_up_for_a_short_round(rounds_of):
    _, seconds = rounds_of(1, warmup_ms=200, duration_s=0.1)
    assert seconds == 2 * (5 + 4 * (1 + 5))


def test_fast_images_fill_a_round_however_short_the_duration(rounds_of):
    assert rounds_of(0.0004, warmup_ms=0, duration_s=1e-9)[0] == [50] * 4


def _fake(network, strategy):
    backend = FakeBackend()
    engines = {part.name: backend.load(part, b"{}", layout="NCHW") for part in network.parts}
    return Orchestrator(network, backend, engines, strategy=strategy, max_batch=64), backend.calls


def test_given_bits_still_run_the_policy_network(network):
    chain, calls = _fake(network, "chain")
    full, full_calls = _fake(network, "full")
    keep = np.array([[True, False, True]] * 4)
    samples = measure({"full": full, "chain": chain}, Workload(images=_images(4), keep=keep), SHORT)
    per_image = ["policy", "stem", "block_00", "shortcut_01", "block_02", "head"]
    assert [name for name, _ in calls] == per_image * (len(calls) // len(per_image))
    assert {name for name, _ in full_calls} == {"full"}
    cost = {part.name: part.flops for part in network.parts}
    assert set(samples["chain"].blocks_run) == {2.0}
    assert set(samples["chain"].flops) == {sum(cost[name] for name in per_image)}
    assert set(samples["full"].flops) == {cost["full"]}
    assert set(samples["full"].blocks_run) == {3.0}


def test_learned_policy_decides_while_measured(network):
    chain, calls = _fake(network, "chain")
    full, _ = _fake(network, "full")
    samples = measure({"full": full, "chain": chain}, Workload(images=_images(6), keep=None), SHORT)
    assert sum(name == "policy" for name, _ in calls) == sum(name == "stem" for name, _ in calls)
    learned = chain.run(_images(6)).blocks_run
    found = samples["chain"].blocks_run.tolist()
    assert len(found) >= N_ROUNDS * measuring.LEAST_IMAGES  # the first request, as slow as the machine, says how many
    assert found == [learned[i % 6] for i in range(len(found))]


def test_part_table_counts_calls_for_each_image(network):
    chain, _ = _fake(network, "chain")
    keep = np.array([[True, False, True], [True, True, False]])
    rows = {
        row["name"]: row for row in run_instrumented("chain", chain, Workload(images=_images(2), keep=keep)).parts()
    }
    assert {name: row["usage"] for name, row in rows.items()} == {
        "policy": 1,
        "stem": 1,
        "block_00": 1,
        "block_01": 0.5,
        "shortcut_01": 0.5,
        "block_02": 0.5,
        "shortcut_02": 0.5,
        "head": 1,
    }
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert all(row["mean_ms"] > 0 for row in rows.values())


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"warmup_ms": -1}, {"duration_s": 0}, {"duration_s": float("nan")}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        Settings(**wrong)


@pytest.fixture
def profiled(tiny):
    def run(data="synthetic:6", **options):
        bundle = Bundle.open(tiny.bundle)
        options = {"policy": None, "strategies": ["chain"], "settings": SHORT} | options
        return profile(bundle, open_data(data, network=bundle.network), place=Place(), **options)

    return run


def test_synthetic_input_is_labelled(profiled):
    result = profiled()
    assert result.to_json()["is_real_input"] is False
    assert "not real images" in result.to_json()["input_source"]
    assert "what a policy network keeps on them means nothing. Give real ones with --data" in result.warnings[0]
    assert "policy network" not in profiled(policy="110").warnings[0]


def test_real_input_is_no_warning(profiled, tmp_path):
    np.savez(tmp_path / "x.npz", x=_images(5))
    result = profiled(str(tmp_path / "x.npz"))
    assert result.to_json()["is_real_input"] is True
    assert not any("input" in warning for warning in result.warnings)


def test_baseline_is_always_there_and_first(profiled):
    assert list(profiled(strategies=["chain", "full", "chain"]).samples) == ["full", "chain"]
    assert list(profiled(strategies=["full"]).samples) == ["full"]


def test_profile_names_what_the_policy_network_did(profiled):
    assert profiled().policy_network == "decides"
    assert profiled(policy="none").policy_network.startswith("runs on every image")


def test_unknown_strategy_and_policy_are_refused(profiled):
    with pytest.raises(UsageError, match="'magic'"):
        profiled(strategies=["magic"])
    with pytest.raises(PolicyError, match="got 1 bits"):
        profiled(policy="1")


def test_environment_says_what_is_needed_to_repeat_it(profiled):
    environment = profiled().environment
    assert environment["threads"] >= 1
    assert environment["backend"].startswith("onnxruntime ")
    assert environment["cpu"]
    assert environment["device"] == "cpu"


def test_baseline_for_other_images_is_refused(profiled, tiny):
    bundle = Bundle.open(tiny.bundle)
    small = replace(bundle.network, preprocessing=replace(bundle.network.preprocessing, height=16, width=16))
    other = Bundle(tiny.bundle, replace(bundle.manifest, network=small))
    with pytest.raises(UsageError, match=r"takes images of 16 x 16, .* of 32 x 32\. .* give one of that size"):
        profiled(baseline=other)

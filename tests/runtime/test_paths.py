"""Path engines give the chain's logits; their cache holds what it promises, and no more."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bdtool.errors import EngineError, UsageError
from bdtool.runtime.controllers import MaskController
from bdtool.runtime.factory import make_strategy
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.paths import BUILD_AFTER, PathCache, PathOptions
from bdtool.runtime.strategies import MAX_LANES

K = 6
REPOSITORY = Path(__file__).parents[2]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # the bound: groups are other batch sizes, with other kernels


def _bits(text):
    return np.array([bit == "1" for bit in text])


def _mask(number, n_bits=16):
    return _bits(format(number, f"0{n_bits}b"))


@pytest.fixture
def path(fake):
    """Return a function that opens the hand-made network with strategy 'path'; closed after the test."""
    opened = []

    def open_path(**options):
        max_batch = options.pop("max_batch", 8)
        opened.append(fake(strategy="path", max_batch=max_batch, paths=PathOptions(**options)))
        return opened[-1]

    yield open_path
    for one in opened:
        one.runtime.close()


@pytest.fixture
def cache():
    """Return a function that makes a cache of engines of 10 bytes, or as `sizes` says; it notes what it joined."""
    made = []

    def make(sizes=lambda mask: 10, **options):
        joined = []

        def join(mask):
            joined.append("".join("01"[bit] for bit in mask.astype(int)))
            return object(), sizes(mask)

        made.append(PathCache(join, PathOptions(**options)))
        return made[-1], joined

    yield make
    for one in made:
        one.close()


def _see(cache, mask, times=BUILD_AFTER):
    for _ in range(times):
        cache.get(mask)
    cache.settle()


# --- the same logits as the chain ---


@settings(max_examples=60)
@given(data=st.data(), n=st.integers(1, 8))
def test_path_is_bit_equal_to_the_chain_on_the_fake_backend(shared_path, fake_oracle, images_of, data, n):
    values = data.draw(st.lists(st.integers(0, 96), min_size=n, max_size=n))
    pool = data.draw(hnp.arrays(bool, (3, K)))
    keep = pool[data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))]
    for _ in range(2):  # through the chain, or the mask was met in an earlier example; then as paths
        result = shared_path.runtime.run(images_of(values), policy=keep)
        assert result.logits[:, 0].tolist() == [fake_oracle(v, row) for v, row in zip(values, keep, strict=True)]
        np.testing.assert_array_equal(result.policy, keep)
        shared_path.runtime._strategy.cache.settle()


@pytest.fixture(scope="module")
def shared_path(fake):
    opened = fake(strategy="path", max_batch=8)
    yield opened
    opened.runtime.close()


@pytest.fixture(scope="module", params=["average-pool", "option-a"])
def both(request, export_random):
    """A model of six blocks with its chain and its path strategy on real engines, every second mask ahead."""
    exported = export_random("resnet14", shortcut=request.param)
    ahead = [_mask(number, K) for number in range(0, 2**K, 2)]
    options = PathOptions(ahead=ahead, background=False)
    with (
        Orchestrator.open(exported.bundle) as chain,
        Orchestrator.open(exported.bundle, strategy="path", paths=options) as paths,
    ):
        yield exported.model, chain, paths


def _check(both, images, keep):
    _, chain, paths = both
    expected, actual = chain.run(images, policy=keep), paths.run(images, policy=keep)
    np.testing.assert_allclose(actual.logits, expected.logits, **TOLERANCE)
    np.testing.assert_array_equal(actual.policy, expected.policy)
    np.testing.assert_array_equal(actual.hits, ~actual.policy[:, -1])


@settings(max_examples=20)
@given(keep=hnp.arrays(bool, st.tuples(st.sampled_from([1, 1, 2, 5, 16]), st.just(K))))
def test_path_equals_the_chain_on_real_engines(both, preprocessed, keep):
    _check(both, preprocessed(both[0], len(keep)), keep)


@pytest.mark.parametrize("n_images", [1, 5])
@pytest.mark.parametrize("bits", ["000000", "110010", "001101", "111110"])
def test_dropped_stage_changes_equal_the_chain(both, preprocessed, bits, n_images):
    _check(both, preprocessed(both[0], n_images), np.tile(_bits(bits), (n_images, 1)))


@pytest.mark.parametrize("n_images", [1, 20])
def test_learned_policy_equals_the_chain(both, preprocessed, n_images):
    _check(both, preprocessed(both[0], n_images), "learned")


def test_path_engine_of_an_image_is_two_calls_with_a_policy(path, images_of):
    opened = path(ahead=[_bits("011011")])  # what the fake policy says of an image full of 3
    result = opened.runtime.run(images_of([3]))
    assert opened.backend.calls == [("policy", 1), ("path", 1)]
    assert result.hits.tolist() == [True]


# --- hits and refusals ---


def test_hits_are_reported_for_each_image_and_in_the_stats(path, images_of):
    runtime = path(ahead=[_bits("110101")], background=False).runtime
    keep = np.stack([_bits("110101"), _bits("000000"), _bits("110101")])
    assert runtime.run(images_of([1, 2, 3]), policy=keep).hits.tolist() == [True, False, True]
    assert runtime.run(images_of([1]), policy="none").hits.tolist() == [False]
    stats = runtime.path_stats
    assert (stats.hits, stats.misses, stats.hit_rate) == (2, 2, 0.5)


def test_hits_of_slices_are_put_together(path, images_of):
    runtime = path(ahead=[_bits("110101")], background=False, max_batch=2).runtime
    keep = np.stack([_bits("110101"), _bits("000000")])[[0, 1, 1, 0, 0]]
    assert runtime.run(images_of(range(5)), policy=keep).hits.tolist() == [True, False, False, True, True]


def test_hit_rate_before_the_first_image_is_nan(path):
    assert np.isnan(path().runtime.path_stats.hit_rate)


def test_other_strategies_have_no_hits(fake, images_of):
    runtime = fake().runtime
    assert runtime.run(images_of([1])).hits is None
    assert runtime.path_stats is None


def test_images_of_a_mixed_batch_run_together_by_mask_and_the_rest_through_the_chain(path, images_of):
    opened = path(ahead=[_bits("110101"), _bits("000001")], background=False)
    keep = np.stack([_bits(text) for text in ("110101", "000001", "110101", "111111", "000000")])
    opened.runtime.run(images_of(range(5)), policy=keep)
    assert sorted(n for name, n in opened.backend.calls if name == "path") == [1, 2]
    assert [n for name, n in opened.backend.calls if name == "stem"] == [2]


class FindsBitsOnTheWay(MaskController):
    mask = None


def test_controller_that_finds_its_bits_on_the_way_is_refused(path, images_of):
    controller = FindsBitsOnTheWay(np.ones((1, K), dtype=bool), threshold=0.5)
    with pytest.raises(UsageError, match=r"strategy 'path' needs every keep bit before block 0; this controller finds"):
        path().runtime.run_with(images_of([1]), controller)


def test_engines_that_cannot_be_joined_are_refused(fake):
    opened = fake()
    engines = {part.name: opened.runtime.engine(part) for part in opened.network.parts}
    with pytest.raises(TypeError, match="strategy 'path' joins engines and needs an EngineSet, got dict"):
        make_strategy("path", opened.network, opened.backend, engines)


def test_mask_of_another_network_is_refused(path):
    with pytest.raises(UsageError, match=r"mask of shape \[7\] has no path; this network's masks have 6 bits"):
        path(ahead=[np.ones(7, dtype=bool)])


@pytest.mark.parametrize("bound", [{"max_paths": 0}, {"max_bytes": 0}])
def test_bound_that_holds_nothing_is_refused(bound):
    with pytest.raises(ValueError, match="must be at least 1"):
        PathOptions(**bound)


def test_wrap_sees_path_calls_of_single_images_and_of_mixed_batches(fake, images_of):
    opened, seen = fake(), []

    def wrap(part, call):
        return lambda: (seen.append(part.name), call())

    options = PathOptions(ahead=[_bits("110101"), _bits("000001")], background=False)
    strategy = make_strategy("path", opened.network, opened.backend, opened.runtime._engines, wrap=wrap, paths=options)
    for keep in (_bits("110101")[None], np.stack([_bits("110101"), _bits("000001"), _bits("110011")])):
        strategy.run(images_of(range(len(keep))), MaskController(keep, threshold=0.5))
    assert seen == [name for name, _ in opened.backend.calls]
    assert seen.count("path") == 3


# --- what the cache joins, keeps and drops ---


def test_masks_given_ahead_hit_at_once(path, images_of):
    runtime = path(ahead=[_bits("110101")]).runtime
    assert runtime.run(images_of([1, 2]), policy="110101").hits.all()


def test_ahead_masks_that_do_not_fit_are_left_out(cache):
    held, joined = cache(max_paths=2, ahead=[_mask(n) for n in range(4)])
    assert joined == [format(n, "016b") for n in range(2)]
    small, _ = cache(max_bytes=25, ahead=[_mask(n) for n in range(4)])
    assert (held.stats.n_paths, small.stats.n_paths, small.stats.n_bytes, small.stats.dropped) == (2, 2, 20, 0)


def test_mask_given_ahead_twice_counts_once(cache):
    held, joined = cache(ahead=[_mask(1), _mask(1)])
    assert len(joined) == held.stats.n_paths == 1
    assert held.stats.n_bytes == 10


def test_most_frequent_ahead_mask_is_dropped_last(cache):
    held, _ = cache(max_paths=3, ahead=[_mask(1), _mask(2), _mask(3)])
    _see(held, _mask(4))
    _see(held, _mask(5))
    assert held.get(_mask(1)) is not None
    assert held.get(_mask(2)) is held.get(_mask(3)) is None


def test_mask_is_joined_in_the_background_when_seen_often_enough(cache):
    held, joined = cache()
    _see(held, _mask(1), BUILD_AFTER - 1)
    assert joined == []
    assert held.get(_mask(1)) is None  # this sighting asks for it, and does not wait
    held.settle()
    assert joined == [format(1, "016b")]
    assert held.get(_mask(1)) is not None


def test_batch_counts_each_of_its_images(cache):
    held, joined = cache()
    held.get(_mask(1), BUILD_AFTER)
    held.settle()
    assert len(joined) == 1


def test_nothing_is_joined_without_the_background(cache):
    held, joined = cache(background=False)
    _see(held, _mask(1), 10 * BUILD_AFTER)
    assert joined == []


def test_least_recently_used_mask_is_dropped_first(cache):
    held, _ = cache(max_paths=2)
    _see(held, _mask(1))
    _see(held, _mask(2))
    assert held.get(_mask(1)) is not None
    _see(held, _mask(3))
    assert held.get(_mask(2)) is None
    assert held.get(_mask(1)) is not None
    assert held.get(_mask(3)) is not None
    assert held.stats.dropped == 1


def test_dropped_mask_has_to_be_seen_often_again(cache):
    held, joined = cache(max_paths=1)
    _see(held, _mask(1))
    _see(held, _mask(2))
    _see(held, _mask(1), BUILD_AFTER - 1)
    assert len(joined) == 2
    _see(held, _mask(1), 1)
    assert len(joined) == 3


@pytest.mark.parametrize("bounds", [{"max_paths": 7}, {"max_bytes": 100}, {"max_paths": 50, "max_bytes": 333}])
def test_bounds_hold_for_a_thousand_masks_each_seen_twice(cache, bounds):
    held, joined = cache(sizes=lambda mask: 1 + int(mask.sum()), **bounds)
    for number in range(1000):
        _see(held, _mask(number))
        stats = held.stats
        assert stats.n_paths <= bounds.get("max_paths", 64)
        assert stats.n_bytes <= bounds.get("max_bytes", 768 * 2**20)
    assert len(joined) == stats.joined == 1000
    assert stats.dropped == 1000 - stats.n_paths
    assert stats.n_bytes == sum(path.n_bytes for path in held._paths.values())


def test_path_larger_than_the_bound_is_not_kept_and_not_joined_again(cache):
    held, joined = cache(sizes=lambda mask: 200 if mask.all() else 10, max_bytes=100)
    _see(held, _mask(1))
    for _ in range(5):
        _see(held, np.ones(16, dtype=bool))
    assert joined == [format(1, "016b"), "1" * 16]
    assert (held.stats.n_paths, held.stats.n_bytes, held.stats.dropped) == (1, 10, 0)


@pytest.mark.parametrize("error", [EngineError("no memory"), RuntimeError("no memory")])
def test_failed_join_warns_once_and_its_images_run_through_the_chain(
    path, images_of, fake_oracle, monkeypatch, caplog, error
):
    opened, tried = path(), []

    def join(name, pieces):
        tried.append(name)
        raise error

    monkeypatch.setattr(opened.backend, "join", join)
    for _ in range(12):
        result = opened.runtime.run(images_of([5]), policy="110101")
        opened.runtime._strategy.cache.settle()
        assert result.logits[0, 0] == fake_oracle(5, _bits("110101"))
        assert not result.hits.any()
    assert len(tried) == 1
    (record,) = caplog.records
    assert "a path engine could not be joined, its images run through the chain" in record.getMessage()
    assert record.levelno == (logging.WARNING if isinstance(error, EngineError) else logging.ERROR)


def test_failed_joins_do_not_keep_others_from_being_joined(path, images_of, monkeypatch):
    opened = path()
    join, cache = opened.backend.join, opened.runtime._strategy.cache
    with monkeypatch.context() as patch:
        patch.setattr(opened.backend, "join", lambda name, pieces: [][0])
        for number in range(1, 21):
            opened.runtime.run(images_of([1, 2]), policy=_mask(number, K))
            cache.settle()
    assert opened.backend.join == join
    opened.runtime.run(images_of([1, 2]), policy=_mask(40, K))
    cache.settle()
    assert opened.runtime.run(images_of([1, 2]), policy=_mask(40, K)).hits.all()


def _path_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("bdtool-paths")]


def test_close_finishes_the_join_under_way_and_leaves_no_thread_behind():
    started, go, joined = threading.Event(), threading.Event(), []

    def join(mask):
        started.set()
        go.wait(10)
        joined.append(mask)
        return object(), 10

    before, cache = len(_path_threads()), PathCache(join, PathOptions())
    cache.get(_mask(1), BUILD_AFTER)
    cache.get(_mask(2), BUILD_AFTER)
    assert started.wait(10)
    assert len(_path_threads()) == before + 1
    threading.Timer(0.05, go.set).start()
    cache.close()
    assert len(joined) == 1  # the other one had not begun
    assert len(_path_threads()) == before
    assert (cache.stats.n_paths, cache.stats.n_bytes) == (0, 0)


def test_closed_orchestrator_leaves_no_thread_behind(path, images_of):
    before = len(_path_threads())
    with path().runtime as runtime:
        runtime.run(images_of([1, 2]), policy="110101")
        assert len(_path_threads()) == before + 1
    assert len(_path_threads()) == before
    assert runtime.path_stats is None


def test_orchestrators_do_not_share_their_caches(path, images_of):
    first, second = path(ahead=[_bits("110101")]).runtime, path().runtime
    assert first.run(images_of([1]), policy="110101").hits.all()
    assert not second.run(images_of([1]), policy="110101").hits.any()
    assert (first.path_stats.n_paths, second.path_stats.n_paths) == (1, 0)


def test_path_engines_stay_bound_only_to_buffers_that_the_chain_keeps(path, images_of):
    runtime = path(ahead=[_bits("110101")], max_batch=32).runtime
    for n in range(1, 4 * MAX_LANES):
        runtime.run(images_of(range(n)), policy="110101")
    (held,) = runtime._strategy.cache._paths.values()
    assert len(held.calls) <= MAX_LANES


# --- memory of real engines, in a process of its own ---

_A_THOUSAND_MASKS = """
import os, sys
import numpy as np
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.paths import PathOptions

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

options = PathOptions(max_bytes=int(sys.argv[2]))
with Orchestrator.open(sys.argv[1], strategy="path", threads=1, paths=options) as runtime:
    image, n_blocks = np.zeros((1, 32, 32, 3), np.uint8), runtime.network.n_blocks
    for policy in ("all", "none"):
        runtime.run(image, policy=policy)
    before = resident_bytes()
    for number in range(1000):
        mask = [int(bit) for bit in format(number * 4 + 3, f"0{n_blocks}b")]
        for _ in range(2):
            runtime.run(image, policy=mask)
        runtime._strategy.cache.settle()
        assert runtime.run(image, policy=mask).hits.all()
        assert runtime.path_stats.n_bytes <= options.max_bytes
    print(runtime.path_stats.joined, runtime.path_stats.n_paths, resident_bytes() - before)
"""
SLACK_BYTES = 24 * 2**20  # what freed engines leave in the allocator, buffers of the lane and the list of masks


def test_a_thousand_masks_on_real_engines_keep_memory_under_the_bound(export_random):
    bundle = export_random("resnet26", shortcut="average-pool", has_policy=False).bundle  # 12 blocks: 4096 masks
    Orchestrator.open(bundle).close()  # builds the engines, so that the process below only loads them
    max_bytes = 48 * 2**20
    command = [sys.executable, "-c", _A_THOUSAND_MASKS, str(bundle), str(max_bytes)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    joined, n_paths, grown = map(int, done.stdout.split())
    assert joined == 1000
    assert n_paths > 8  # the bound leaves room for some
    assert grown < max_bytes + SLACK_BYTES

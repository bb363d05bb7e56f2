"""Path engines give the chain's logits, and the strategy copes with engines that cannot be joined."""

import logging
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bdtool.errors import EngineError, UsageError
from bdtool.runtime.controllers import MaskController
from bdtool.runtime.factory import make_strategy
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import BUILD_AFTER, PathCache, PathOptions
from bdtool.runtime.strategies import MAX_LANES
from engines.base import JoinedEngine
from engines.fake import FakeBackend

K = 6
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
        shared_path.runtime._forms.strategy.cache.settle()


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


def test_mixed_batch_keeps_its_size_where_engines_plan_by_batch(path, images_of, fake_oracle, monkeypatch):
    monkeypatch.setattr(FakeBackend, "plans_by_batch", True)
    opened = path(ahead=[_bits("110101")], background=False)
    keep = np.stack([_bits("110101"), _bits("000001"), _bits("110101")])
    result = opened.runtime.run(images_of(range(3)), policy=keep)
    assert {n for _, n in opened.backend.calls} == {3}
    assert not result.hits.any()
    assert result.logits[:, 0].tolist() == [fake_oracle(v, row) for v, row in enumerate(keep)]
    assert opened.runtime.run(images_of(range(3)), policy="110101").hits.all()


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


def test_controller_may_ask_for_the_policy_of_other_images(tiny, pixels):
    images, keep = pixels(tiny.model, 4), np.array([[1, 0, 1], [1, 0, 1], [0, 1, 0], [0, 1, 0]], dtype=bool)

    class Asking(MaskController):
        def begin(self, n_images, probabilities):
            super().begin(n_images, probabilities)
            runtime.keep_probability(images[::-1])

    with Orchestrator.open(tiny.bundle, strategy="path", paths=PathOptions(ahead=keep[::2])) as runtime:
        expected = runtime.run(images, policy=keep).logits
        np.testing.assert_array_equal(runtime.run_with(images, Asking(keep, threshold=0.5)).logits, expected)


def test_mask_of_another_network_is_refused(path):
    with pytest.raises(UsageError, match=r"mask of shape \[7\] has no path; this network's masks have 6 bits"):
        path(ahead=[np.ones(7, dtype=bool)])


def test_wrap_sees_path_calls_of_single_images_and_of_mixed_batches(fake, images_of):
    opened, seen = fake(), []

    def wrap(part, call):
        return lambda: (seen.append(part.name), call())

    options = PathOptions(ahead=[_bits("110101"), _bits("000001")], background=False)
    strategy = make_strategy(
        "path", opened.network, opened.backend, opened.runtime._forms.loaded.engines, wrap=wrap, paths=options
    )
    for keep in (_bits("110101")[None], np.stack([_bits("110101"), _bits("000001"), _bits("110011")])):
        strategy.run(images_of(range(len(keep))), MaskController(keep, threshold=0.5))
    assert seen == [name for name, _ in opened.backend.calls]
    assert seen.count("path") == 3


# --- what the cache joins, keeps and drops ---


def test_masks_given_ahead_hit_at_once(path, images_of):
    runtime = path(ahead=[_bits("110101")]).runtime
    assert runtime.run(images_of([1, 2]), policy="110101").hits.all()


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
        opened.runtime._forms.strategy.cache.settle()
        assert result.logits[0, 0] == fake_oracle(5, _bits("110101"))
        assert not result.hits.any()
    assert len(tried) == 1
    (record,) = caplog.records
    assert "a path engine could not be joined, its images run through the chain" in record.getMessage()
    assert record.levelno == (logging.WARNING if isinstance(error, EngineError) else logging.ERROR)


def test_failed_joins_do_not_keep_others_from_being_joined(path, images_of, monkeypatch):
    opened = path()
    join, cache = opened.backend.join, opened.runtime._forms.strategy.cache
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
        return JoinedEngine(engine=object(), own_bytes=10)

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
    (held,) = runtime._forms.strategy.cache._paths.values()
    assert len(held.calls) <= MAX_LANES

"""The path cache joins, keeps and drops what it promises, within its bounds."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bdtool.runtime import path_cache
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import BUILD_AFTER, PathCache, PathOptions
from engines.base import JoinedEngine

REPOSITORY = Path(__file__).parents[2]


def _mask(number):
    return np.array([bit == "1" for bit in format(number, "016b")])


@pytest.fixture
def cache():
    """Return a function that makes a cache of engines of 10 bytes, or as `sizes` says; it notes what it joined.

    `shared` says how many bytes of weights joining an engine adds for all.
    """
    made = []

    def make(sizes=lambda mask: 10, shared=lambda mask: 0, **options):
        joined = []

        def join(mask):
            joined.append("".join("01"[bit] for bit in mask.astype(int)))
            return JoinedEngine(engine=object(), own_bytes=sizes(mask), shared_bytes=shared(mask))

        made.append(PathCache(join, PathOptions(**options)))
        return made[-1], joined

    yield make
    for one in made:
        one.close()


def _see(cache, mask, times=BUILD_AFTER):
    for _ in range(times):
        cache.get(mask)
    cache.settle()


@pytest.mark.parametrize("bound", [{"max_paths": 0}, {"max_bytes": 0}])
def test_bound_that_holds_nothing_is_refused(bound):
    with pytest.raises(ValueError, match="must be at least 1"):
        PathOptions(**bound)


@pytest.mark.parametrize("shares", [[0.5], [0.5, 0.3, 0.1], [0.6, 0.5], [-0.1, 0.5], [float("nan"), 0.5]])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match=r"shares: got \[.*\] for 2 masks ahead; expected as many"):
        PathOptions(ahead=[_mask(1), _mask(2)], shares=shares)


def test_probabilities_are_no_masks():
    """Each would be taken for a mask that keeps every block."""
    with pytest.raises(ValueError, match=r"ahead: got the value 0\.25, expected only 0 .*`Orchestrator\.decide` gives"):
        PathOptions(ahead=np.array([[0.0, 1.0], [1.0, 0.25]]))
    numbers = PathOptions(ahead=[[0, 1], [1.0, 0.0]]).frequent()
    np.testing.assert_array_equal([mask for mask, _ in numbers], [[False, True], [True, False]])


def test_shares_default_to_equal_ones_of_all_masks_ahead():
    options = PathOptions(ahead=[_mask(n) for n in range(4)], max_paths=3)
    masks, shares = zip(*options.frequent(), strict=True)
    np.testing.assert_array_equal(masks, [_mask(n) for n in range(3)])
    assert shares == (0.25, 0.25, 0.25)
    assert PathOptions().frequent() == []


def test_masks_of_sample_images_are_as_frequent_as_they_come():
    decided = np.stack([_mask(n) for n in (1, 2, 3, 2)])
    masks, shares = zip(*PathOptions(ahead=decided, max_paths=2).frequent(), strict=True)
    np.testing.assert_array_equal(masks, [_mask(2), _mask(1)])
    assert shares == (0.5, 0.25)
    assert PathOptions(ahead=decided).frequent_share() == 1


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
    _see(held, _mask(4), 2 * BUILD_AFTER)
    _see(held, _mask(5), 2 * BUILD_AFTER)
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
    _see(held, _mask(3), 2 * BUILD_AFTER)
    assert held.get(_mask(2)) is None
    assert held.get(_mask(1)) is not None
    assert held.get(_mask(3)) is not None
    assert held.stats.dropped == 1


def test_engine_goes_for_a_mask_that_comes_twice_as_often(cache):
    held, joined = cache(max_paths=1)
    _see(held, _mask(1), 10)
    _see(held, _mask(2), 19)
    assert len(joined) == 1
    _see(held, _mask(2), 1)
    assert len(joined) == 2
    _see(held, _mask(1), 29)  # its 10 are not forgotten
    assert len(joined) == 2
    _see(held, _mask(1), 1)
    assert len(joined) == 3


def test_mask_given_ahead_counts_as_seen(cache):
    held, joined = cache(max_paths=1, ahead=[_mask(1)])
    _see(held, _mask(2), 2 * BUILD_AFTER - 1)
    assert len(joined) == 1
    _see(held, _mask(2), 1)
    assert len(joined) == 2


def test_more_masks_than_fit_that_come_alike_often_are_not_joined_without_end(cache):
    held, joined = cache(max_paths=8)
    for seed in range(100):
        for number in np.random.default_rng(seed).permutation(20):
            held.get(_mask(number))
        held.settle()
    assert len(joined) == 8
    assert held.stats.hit_rate > 0.35  # 8 of 20, but for the first round


def test_masks_of_long_ago_make_room(cache, monkeypatch):
    monkeypatch.setattr(path_cache, "HALVE_AFTER", 50)
    held, _ = cache(max_paths=4)
    for number in range(4):
        _see(held, _mask(number), 100)
    for _ in range(50):
        for number in range(4, 8):
            _see(held, _mask(number), 1)
    assert all(held.get(_mask(number)) is not None for number in range(4, 8))


def test_weights_larger_than_the_bound_keep_everything_in_the_chain(cache):
    held, joined = cache(max_bytes=100, shared=lambda mask: 200 if len(joined) == 1 else 0)
    for number in range(9):
        _see(held, _mask(number), 5)
    assert len(joined) == 1
    assert held.stats.n_paths == 0


@pytest.mark.parametrize("bounds", [{"max_paths": 7}, {"max_bytes": 100}, {"max_paths": 50, "max_bytes": 333}])
def test_bounds_hold_for_a_thousand_masks_one_after_the_other(cache, bounds, monkeypatch):
    monkeypatch.setattr(path_cache, "HALVE_AFTER", 2)
    held, joined = cache(sizes=lambda mask: 1 + int(mask.sum()), **bounds)
    for number in range(1000):
        _see(held, _mask(number), 5)
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


def test_shared_weights_count_once_and_stay_when_an_engine_goes(cache):
    held, _ = cache(max_paths=1, shared=lambda mask: 100 if mask.sum() == 1 else 0)
    _see(held, _mask(1))
    _see(held, _mask(3), 2 * BUILD_AFTER)
    assert (held.stats.n_paths, held.stats.n_bytes, held.stats.dropped) == (1, 110, 1)


def test_weights_that_leave_no_room_drop_the_engines_before(cache):
    held, _ = cache(max_bytes=100, shared=lambda mask: 85 if mask.all() else 0)
    _see(held, _mask(1))
    _see(held, np.ones(16, dtype=bool))
    assert held.get(_mask(1)) is None
    assert held.get(np.ones(16, dtype=bool)) is not None
    assert held.stats.n_bytes == 95


def test_weights_that_leave_no_room_drop_the_rarest_mask_ahead(cache):
    masks = [_mask(1), _mask(2), np.ones(16, dtype=bool)]
    held, _ = cache(max_bytes=100, shared=lambda mask: 85 if mask.all() else 0, ahead=masks)
    assert held.get(_mask(1)) is not None
    assert held.get(_mask(2)) is None
    assert held.stats.n_bytes == 95


# --- memory of real engines, in a process of its own ---

_A_THOUSAND_MASKS = """
import os, sys
import numpy as np
from bdtool.runtime import path_cache
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions

path_cache.HALVE_AFTER = 2  # so that each mask takes the place of one before

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
        for _ in range(5):
            runtime.run(image, policy=mask)
        runtime._forms.strategy.cache.settle()
        assert runtime.run(image, policy=mask).hits.all()
        assert runtime.path_stats.n_bytes <= options.max_bytes
    print(runtime.path_stats.joined, runtime.path_stats.n_paths, resident_bytes() - before)
"""
SLACK_BYTES = 24 * 2**20  # what freed engines leave in the allocator, buffers of the lane and the list of masks


def test_a_thousand_masks_on_real_engines_keep_memory_under_the_bound(export_random):
    bundle = export_random("resnet26", shortcut="average-pool", has_policy=False).bundle  # 12 blocks: 4096 masks
    Orchestrator.open(bundle).close()  # builds the engines, so that the process below only loads them
    max_bytes = 24 * 2**20
    command = [sys.executable, "-c", _A_THOUSAND_MASKS, str(bundle), str(max_bytes)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    joined, n_paths, grown = map(int, done.stdout.split())
    assert joined == 1000
    assert n_paths > 8  # the bound leaves room for some
    assert grown < max_bytes + SLACK_BYTES

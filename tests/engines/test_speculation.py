"""Which blocks run beside the policy network: by shares of paths, and times that a device might have."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.dispatch import runs
from engines.speculation import NO_SPECULATION, best_speculation, speculations

N_BLOCKS = 6


def _path(mask):
    return tuple(runs([bit == "1" for bit in mask], [False] * len(mask))[0])


def _best(paths, shares, *, policy_ms, again_ms=1.0, block_ms=1.0):
    """Return the best speculation on a device that runs both at once, a stem taking as long as a block."""
    return best_speculation(
        paths,
        shares,
        beside_ms=lambda begun: max(policy_ms, block_ms * (1 + len(begun))),
        alone_ms=lambda begun: block_ms * (1 + len(begun)),
        again_ms=again_ms,
    )


def test_most_frequent_beginning_of_each_length_is_proposed():
    paths = [_path(mask) for mask in ("110100", "110010", "101000", "000000")]
    found = list(speculations(paths, [0.3, 0.2, 0.4, 0.1]))
    assert [(len(one.runs), one.share) for one in found] == [(1, 0.9), (2, 0.5), (3, 0.3)]
    assert [one.runs for one in found] == [paths[2][:1], paths[0][:2], paths[0]]


@pytest.mark.parametrize("paths", [[], [()], [(), ()]])
def test_nothing_is_proposed_where_nothing_runs(paths):
    assert list(speculations(paths, [1 / len(paths)] * len(paths) if paths else [])) == []
    assert _best(paths, [0.5] * len(paths), policy_ms=4) == NO_SPECULATION


@pytest.mark.parametrize(("policy_ms", "n_begun"), [(1, 0), (2, 1), (4, 3), (4.5, 4), (100, 4)])
def test_sure_beginning_is_as_long_as_the_policy_hides(policy_ms, n_begun):
    assert len(_best([_path("110110")], [1.0], policy_ms=policy_ms).runs) == n_begun


def test_beginning_of_few_images_is_not_worth_the_stem_of_the_others():
    paths = [_path("110000"), _path("011000")]
    assert _best(paths, [0.3, 0.3], policy_ms=3) == NO_SPECULATION  # saves 2 ms for 0.3 and adds 1 ms for 0.7
    assert len(_best(paths, [0.6, 0.3], policy_ms=3).runs) == 2


def test_masks_that_differ_later_share_the_speculation():
    found = _best([_path("110100"), _path("110001")], [0.5, 0.4], policy_ms=3)
    assert (found.runs, found.share) == (_path("110000"), 0.9)


def test_device_that_runs_one_thing_at_a_time_speculates_on_nothing():
    found = best_speculation(
        [_path("111000")],
        [0.9],
        beside_ms=lambda begun: 3 + 1 + len(begun),
        alone_ms=lambda begun: 1 + len(begun),
        again_ms=1,
    )
    assert found == NO_SPECULATION


def test_clock_that_rises_meanwhile_makes_no_block_look_cheap():
    timed = itertools.count()

    def faster(ms):
        return ms * (1 - 0.018 * next(timed))

    found = best_speculation(
        [_path("111111")],
        [1.0],
        beside_ms=lambda begun: faster(4 + len(begun)),  # nothing is hidden
        alone_ms=lambda begun: faster(1 + 0.9 * len(begun)),
        again_ms=1,
    )
    assert found == NO_SPECULATION


MASKS = st.lists(
    st.tuples(st.text("01", min_size=N_BLOCKS, max_size=N_BLOCKS), st.integers(0, 5)), min_size=1, max_size=6
)


@given(masks=MASKS, policy_ms=st.floats(0.1, 10), again_ms=st.floats(0, 2))
def test_mean_image_is_never_slower_than_without(masks, policy_ms, again_ms):
    total = sum(count for _, count in masks) + 1  # one image has another mask
    paths, shares = [_path(mask) for mask, _ in masks], [count / total for _, count in masks]
    found = _best(paths, shares, policy_ms=policy_ms, again_ms=again_ms)
    begun = len(found.runs)
    mean_ms = max(policy_ms, 1 + begun)
    for path, share in [*zip(paths, shares, strict=True), ((), 1 - sum(shares))]:
        is_right = path[:begun] == found.runs
        mean_ms += share * (len(path) - begun if is_right else len(path) + again_ms)
    without_ms = max(policy_ms, 1) + sum(share * len(path) for path, share in zip(paths, shares, strict=True))
    assert mean_ms <= without_ms + 1e-9

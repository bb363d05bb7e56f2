"""An interrupted collection goes on where it stopped, and its ranges are those of one that was not."""

import json
import os

import numpy as np
import pytest

from calibration.cache import SAVE_EVERY, ResultCache, collect_ranges, content_key
from calibration.paths import PathBatch, PathWalker, TopUp

KEEP = np.random.default_rng(0).random((16, 3)) < 0.6


@pytest.fixture
def walker(bundle, watched):
    """A walker that notes which images it was given, in `walker.seen`."""

    class Noting(PathWalker):
        seen: list[int] = []

        def add(self, batch, collector):
            self.seen.append(batch.first)
            super().add(batch, collector)

    noting = Noting(bundle.network, watched, TopUp.plan(bundle.network, KEEP, at_least=4))
    noting.seen = []
    return noting


@pytest.fixture
def batches(pixels):
    return [PathBatch(first=i, images=pixels[i : i + 2], keep=KEEP[i : i + 2]) for i in range(0, 16, 2)]


def _broken(batches, n_good):
    yield from batches[:n_good]
    raise KeyboardInterrupt


@pytest.mark.parametrize("n_good", [SAVE_EVERY + 1, 2 * SAVE_EVERY])
def test_an_interrupted_collection_is_taken_up(walker, batches, tmp_path, n_good):
    whole = collect_ranges(walker, batches, tmp_path / "whole.npz")
    walker.seen.clear()
    with pytest.raises(KeyboardInterrupt):
        collect_ranges(walker, _broken(batches, n_good), tmp_path / "r.npz")
    walker.seen.clear()
    told = []
    resumed = collect_ranges(walker, batches, tmp_path / "r.npz", on_batch=told.append)
    assert walker.seen == [batch.first for batch in batches[n_good // SAVE_EVERY * SAVE_EVERY :]]
    assert told == [2] * 8, "images that need not run are done, too"
    ours, theirs = resumed.arrays(), whole.arrays()
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("n_batches", [SAVE_EVERY + 1, 2 * SAVE_EVERY])
def test_a_finished_collection_runs_nothing(walker, batches, tmp_path, n_batches):
    collect_ranges(walker, batches[:n_batches], tmp_path / "r.npz")
    walker.seen.clear()
    collect_ranges(walker, batches[:n_batches], tmp_path / "r.npz")
    assert walker.seen == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"not a zip",
        lambda whole: whole[:500],
        lambda whole: whole[:200] + bytes(100) + whole[300:],
    ],
)
def test_a_damaged_cache_is_made_anew(walker, batches, tmp_path, damage):
    file = tmp_path / "r.npz"
    collect_ranges(walker, batches, file)
    file.write_bytes(damage(file.read_bytes()))
    walker.seen.clear()
    collect_ranges(walker, batches, file)
    assert len(walker.seen) == len(batches)


class _RunsACommand:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_nothing_in_a_cache_is_run(walker, batches, tmp_path):
    command = np.array([_RunsACommand(str(tmp_path / "ran"))], dtype=object)
    np.savez(tmp_path / "r.npz", n_images=np.array(16), **{"x/counts": command})
    collect_ranges(walker, batches[:1], tmp_path / "r.npz")
    assert walker.seen == [0]
    assert not (tmp_path / "ran").exists()


def test_the_key_follows_every_part():
    first = content_key(data="a", policy="b")
    assert first == content_key(policy="b", data="a")
    assert first != content_key(data="a", policy="c")


def test_results_are_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"ms": 1.5}

    (tmp_path / "r.json").write_text("[" * 200_000)
    assert ResultCache(tmp_path / "r.json").get("block_00", compute) == {"ms": 1.5}
    assert ResultCache(tmp_path / "r.json").get("block_00", compute) == {"ms": 1.5}
    assert len(calls) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("0.02", "9.02"),
        lambda text: text.replace("drop", "gain"),
        lambda text: text.replace("sha256", "sha1"),
        lambda text: json.dumps({"block_00": {"drop": 0.02}}),
        lambda text: "[]",
    ],
)
def test_damaged_results_are_computed_anew(tmp_path, damage):
    file = tmp_path / "r.json"
    expected = ResultCache(file).get("block_00", lambda: {"drop": 0.02, "flips": None})
    file.write_text(damage(file.read_text()))
    assert ResultCache(file).get("block_00", lambda: expected) == expected
    assert ResultCache(file).get("block_00", lambda: pytest.fail("computed again")) == expected

"""The split adds up, and the table of parts counts images, also where a batch mixes masks."""

import itertools
import time

import numpy as np
import pytest

from bdtool.profiling.instrumented import run_instrumented
from bdtool.profiling.workload import Workload
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from engines.engine_set import EngineSet
from engines.fake import FakeBackend
from export.bundle import Bundle

KEEP = np.array([[True, False, True], [True, True, False]])


@pytest.fixture
def runtime(tiny):
    """Return a function that opens a strategy of `tiny` on the fake backend."""
    network = Bundle.open(tiny.bundle).network

    def opened(strategy):
        backend = FakeBackend()
        files = {part.name: b"{}" for part in network.parts}
        loaded = {part.name: backend.load(part, files[part.name], layout="NCHW") for part in network.parts}
        engines = EngineSet(loaded, backend=backend, files=files)
        return Orchestrator(network, backend, engines, strategy=strategy, max_batch=64)

    return opened


@pytest.fixture
def ticking(monkeypatch):
    """Each look at the clock is a millisecond later, so that times count looks."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 1000)


def _workload(keep):
    return Workload(images=np.zeros((len(keep), 32, 32, 3), np.uint8), keep=keep)


def _ms(split):
    return {name: component["ms"] for name, component in split["components"].items()}


@pytest.mark.usefixtures("ticking")
def test_each_part_states_the_spread_of_its_calls(runtime):
    rows = run_instrumented("chain", runtime("chain"), _workload(KEEP[:1])).parts()
    assert [row["call_ms_iqr"] for row in rows] == [pytest.approx([1, 1])] * len(rows)  # every call is one tick


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize(("duration_s", "n_requests"), [(3, 60), (0.5, 20), (0.01, 3)])
def test_the_pass_takes_as_long_as_was_asked(runtime, duration_s, n_requests):
    """A request of the warm-up is some 12 ticks of a millisecond; half of the time is the warm-up's."""
    seen = run_instrumented("chain", runtime("chain"), _workload(KEEP[:1]), duration_s=duration_s)
    assert len(seen.total_ms) == pytest.approx(n_requests, abs=1)
    assert len(seen.total_ms) >= 3
    assert seen.split()["n_images"] == len(seen.total_ms)


@pytest.mark.usefixtures("ticking")
def test_split_of_the_chain_by_hand(runtime):
    split = run_instrumented("chain", runtime("chain"), _workload(KEEP[:1])).split()
    # six calls of a tick each, a tick to the next look before each and after the last
    assert _ms(split) == pytest.approx({"preprocess": 1, "policy": 1, "stem": 1, "blocks": 3, "head": 1, "dispatch": 7})
    assert split["total_ms"] == pytest.approx(14)
    assert split["total_ms_iqr"] == pytest.approx([14, 14])
    assert sum(component["share"] for component in split["components"].values()) == pytest.approx(1)


@pytest.mark.usefixtures("ticking")
def test_split_of_one_engine_strategies_by_hand(runtime):
    full = run_instrumented("full", runtime("full"), _workload(KEEP[:1])).split()
    assert _ms(full) == pytest.approx({"preprocess": 1, "one_engine": 1, "dispatch": 2})
    paths = PathOptions(ahead=[KEEP[0]], background=False)
    path = run_instrumented("path", runtime("path"), _workload(KEEP[:1]), paths=paths).split()
    assert _ms(path) == pytest.approx({"preprocess": 1, "policy": 1, "one_engine": 1, "dispatch": 3})


def test_a_shortcut_is_used_by_images_that_drop_its_block(runtime):
    keep = np.array([[True, True, False]] * 3 + [[True, False, False]])
    rows = {row["name"]: row for row in run_instrumented("chain", runtime("chain"), _workload(keep)).parts()}
    usage = {name: row["usage"] for name, row in rows.items()}
    assert (usage["block_01"], usage["shortcut_01"], usage["shortcut_02"]) == (0.75, 0.25, 1)
    assert rows["shortcut_01"]["calls"] == 0.25


def test_split_is_for_one_image_of_a_batch(runtime):
    seen = run_instrumented("chain", runtime("chain"), _workload(KEEP), batch=2)
    split = seen.split()
    assert seen.n_images == split["n_images"] == 2 * len(seen.total_ms)
    assert split["total_ms"] == pytest.approx(sum(seen.total_ms) / seen.n_images)
    assert sum(_ms(split).values()) == pytest.approx(split["total_ms"])


def test_table_of_parts_of_mixed_batches_counts_images(runtime):
    seen = run_instrumented("chain", runtime("chain"), _workload(np.repeat(KEEP, 2, axis=0)), batch=4)
    rows = {row["name"]: row for row in seen.parts()}
    usage = {name: row["usage"] for name, row in rows.items()}
    assert usage == {
        "policy": 1,
        "stem": 1,
        "block_00": 1,
        "block_01": 0.5,
        "shortcut_01": 0.5,
        "block_02": 0.5,
        "shortcut_02": 0.5,
        "head": 1,
    }
    assert all(row["calls"] == 1 for row in rows.values())
    assert all(row["ms_per_image"] == pytest.approx(row["mean_ms"] / 4) for row in rows.values())
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)

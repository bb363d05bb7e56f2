"""H2D, compute, D2H, enqueue and host time of a request on a GPU, and trtexec's warnings about them."""

import itertools
import re
import time

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.profiling.device_times import DeviceTimes, device_warnings
from bdtool.profiling.instrumented import run_instrumented
from bdtool.profiling.workload import Workload
from tests.fake_tensorrt import install_gpu

KEEP = np.array([[True, False, True]])
WORKLOAD = Workload(images=np.zeros((1, 32, 32, 3), np.uint8), keep=KEEP)
N_CALLS = 6  # policy, stem, block, shortcut, block, head


def _times(n=20, **medians):
    times = DeviceTimes()
    for _ in range(n):
        for name, ms in ({"h2d": 0.01, "compute": 1.0, "d2h": 0.01, "enqueue": 0.1, "host": 1.2} | medians).items():
            times.add(name, ms)
        times.close_request()
    return times.to_json(np.ones(n))


@pytest.mark.parametrize(
    ("name", "below", "at_threshold", "words"),
    [
        (
            "enqueue",
            0.8,
            0.81,
            r"bound by enqueue time, 0\.810 ms against 1\.000 ms of GPU compute \(above 0\.8 .*graph",
        ),
        ("h2d", 0.99, 1.0, r"bound by host-to-device copies.*1\.000 ms against 1\.000 ms.*images that are on the GPU"),
        ("d2h", 0.99, 1.0, r"bound by device-to-host copies.*1\.000 ms against 1\.000 ms.*larger batches"),
    ],
)
def test_what_binds_the_throughput_is_a_warning_from_trtexecs_threshold(name, below, at_threshold, words):
    assert device_warnings({"chain": _times(**{name: below})}) == []
    [warning] = device_warnings({"steady": _times(), "chain": _times(**{name: at_threshold})})
    assert warning.startswith("chain: throughput may be ")
    assert re.search(words, warning)


@pytest.mark.parametrize(("deviation", "n_warnings"), [(0.024, 0), (0.026, 1)])
def test_unstable_compute_time_of_equal_work_is_a_warning(deviation, n_warnings):
    times, blocks = DeviceTimes(), []
    for sign, (block_ms, n_blocks) in itertools.product((-1, 1), ((1.0, 3), (2.0, 6))):  # more blocks take longer
        for _ in range(50):
            times.add("compute", block_ms + sign * 1.5 * deviation)
            times.close_request()
            blocks.append(n_blocks)
    found = device_warnings({"graph": times.to_json(np.array(blocks))})
    assert len(found) == n_warnings
    assert all("coefficient of variation 2.6% is above 2.5%. Lock the clock" in text for text in found)


def test_compute_that_takes_no_time_has_no_variation():
    assert _times(compute=0.0)["compute_coefficient_of_variation"] is None


@pytest.fixture
def chain(monkeypatch, tmp_path, tiny):
    driver = install_gpu(monkeypatch, tmp_path)
    driver.copy_ms |= {"HtoD": 0.25, "DtoH": 0.5}
    with Orchestrator.open(tiny.bundle, backend="tensorrt", device="cuda:0") as runtime:
        yield runtime


def test_copies_compute_and_enqueueing_are_told_apart(chain, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 1000)  # each look is a millisecond later
    split = run_instrumented("chain", chain, WORKLOAD).split()
    device = split["device"]
    medians = {name: device[f"{name}_ms"]["median"] for name in ("h2d", "compute", "d2h", "enqueue")}
    # image in; keep bits and logits out; a millisecond of the device and one of the host for each engine call
    assert medians == pytest.approx({"h2d": 0.25, "compute": N_CALLS, "d2h": 1.0, "enqueue": N_CALLS})
    assert device["host_ms"]["mean"] == pytest.approx(split["total_ms"])
    assert device["compute_coefficient_of_variation"] == 0
    assert split["components"]["h2d"]["ms"] == pytest.approx(0.25)
    assert split["components"]["d2h"]["ms"] == pytest.approx(1.0)
    assert sum(part["ms"] for part in split["components"].values()) == pytest.approx(split["total_ms"])


def test_copies_outside_of_a_pass_are_not_timed(chain):
    timer = chain.device_timer
    found = []
    images = np.zeros((1, 32, 32, 3), np.uint8)
    with timer.timing_copies(lambda direction, ms: found.append((direction, ms))):
        chain.run(images)
    chain.run(images)
    timer.collect()
    assert found == [("h2d", 0.25), ("d2h", 0.5), ("d2h", 0.5)]


def test_on_the_cpu_there_is_nothing_of_a_device(tiny):
    with Orchestrator.open(tiny.bundle) as runtime:
        split = run_instrumented("chain", runtime, WORKLOAD).split()
    assert split["device"] is None
    assert {"h2d", "d2h"}.isdisjoint(split["components"])

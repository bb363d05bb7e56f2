"""On a GPU nothing is read before it is there, or overwritten before it was read: every strategy, on stand-ins.

`tests.race_detector` finds what nothing puts in order, though it runs everything at once.
"""

import gc
import threading

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.errors import EngineError
from bdtool.profiling.instrumented import run_instrumented
from bdtool.profiling.workload import Workload
from bdtool.runtime.path_cache import PathOptions
from engines.device_array import LEGACY_STREAM, PER_THREAD_STREAM
from engines.network_graphs import NetworkGraphs
from tests.fake_tensorrt import FakeTensorRT, install_gpu
from tests.race_detector import RaceDetector

PLACE = {"backend": "tensorrt", "device": "cuda:0"}
KEEP = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=bool)
# 101 and 100 begin alike; 010 begins otherwise, and 111 and 000 are new
MASKS = PathOptions(ahead=[KEEP[0], np.array([1, 0, 0], bool), KEEP[1]], shares=[0.5, 0.3, 0.1], max_paths=3)
STRATEGIES = {
    "chain": {"strategy": "chain"},
    "full": {"strategy": "full"},
    "full@off": {"strategy": "full", "cuda_graph": "off"},
    "graph@policy-cache": {"strategy": "graph", "cuda_graph": "policy-cache", "paths": MASKS},
    "graph@switch": {"strategy": "graph", "cuda_graph": "switch"},
    "graph@path-cache": {"strategy": "graph", "cuda_graph": "path-cache", "paths": MASKS},
    "graph@off": {"strategy": "graph", "cuda_graph": "off"},
}
CALLER, BLOCKING, OTHER = 0x77, 0x88, 0x99  # streams of the caller's; the default one waits for BLOCKING


@pytest.fixture
def driver(monkeypatch, tmp_path):
    driver = install_gpu(monkeypatch, tmp_path, driver=RaceDetector(blocking=[BLOCKING]))
    FakeTensorRT.notes["ms"] = {"keep_probability": 4}  # in which other parts run beside the policy network
    yield driver
    driver.check()


class GpuImages:
    """Images that a stream of the caller's makes, in memory which that stream writes again once `run` has returned."""

    def __init__(self, driver, images, stream=CALLER):
        self._driver, self._stream = driver, stream or LEGACY_STREAM
        self._memory = np.zeros(images.nbytes, np.uint8)
        driver.memory[self._memory.ctypes.data] = self._memory
        self.__cuda_array_interface__ = {
            **{"shape": images.shape, "typestr": images.dtype.str, "data": (self._memory.ctypes.data, False)},
            **{"version": 3, "strides": None, "stream": stream},
        }
        self._make(np.frombuffer(images.tobytes(), np.uint8))

    def run(self, runtime, policy=None):
        result = runtime.run(self, policy=policy)
        self._make(0)
        return result

    def _make(self, values):
        address, n_bytes = self._memory.ctypes.data, self._memory.nbytes

        def work():
            self._driver.view(address, n_bytes, writes=True)[:] = values

        self._driver.enqueue(work, stream=self._stream)


def _read(driver, logits, stream=LEGACY_STREAM):
    """Return what one finds who reads logits on the default stream, or on another one that waits for theirs."""
    found = []
    if stream != LEGACY_STREAM:
        driver.wait(stream, logits.__cuda_array_interface__["stream"])
    driver.enqueue(lambda: found.append(driver.view(logits.address, logits.n_bytes).copy()), stream=stream)
    return found[0].view(np.float32).reshape(logits.shape)


def _open(bundle, name):
    """Open a strategy; return it, and the bits to run it with."""
    return Orchestrator.open(bundle, **PLACE, **STRATEGIES[name]), None if name.startswith("full") else KEEP


@pytest.mark.parametrize("name", STRATEGIES)
def test_images_of_the_host(driver, tiny, pixels, preprocessed, torch_logits, name):
    images, ready = pixels(tiny.model, 5), preprocessed(tiny.model, 5)
    runtime, keep = _open(tiny.bundle, name)
    expected, expected_of_reversed = (torch_logits(tiny.model, some, keep) for some in (ready, ready[::-1].copy()))
    with runtime:
        found = [runtime.run(given, policy=keep).logits for given in (images, images[::-1], ready)]
        for logits, one in zip(found, (expected, expected_of_reversed, expected), strict=True):
            np.testing.assert_allclose(logits, one, atol=1e-4)
        for i in range(5):
            bits = None if keep is None else keep[i]
            np.testing.assert_allclose(runtime.run(images[i : i + 1], policy=bits).logits[0], expected[i], atol=1e-4)
        if keep is not None:
            learned = runtime.run(images)
            np.testing.assert_allclose(learned.logits, torch_logits(tiny.model, ready, learned.policy), atol=1e-4)
            np.testing.assert_array_equal(runtime.decide(images), learned.policy)


@pytest.mark.parametrize("last_first", [False, True])
def test_what_runs_beside_the_policy_network(
    driver, monkeypatch, export_random, preprocessed, torch_logits, last_first
):
    """Two blocks of one stage, which write both buffers of its shape; and several SWITCHes for other masks."""
    driver.last_first = last_first
    monkeypatch.setitem(NetworkGraphs.__init__.__kwdefaults__, "blocks_per_switch", 2)
    exported = export_random("resnet14")
    keep = np.array([[1, 1, 0, 1, 0, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0]], dtype=bool)
    paths, images = PathOptions(ahead=list(keep[:3]), shares=[0.5, 0.3, 0.1]), preprocessed(exported.model, 4)
    options = {"strategy": "graph", "cuda_graph": "policy-cache", "paths": paths}
    with Orchestrator.open(exported.bundle, **PLACE, **options) as runtime:
        for bits in (keep, None):
            result = runtime.run(images, policy=bits)
            expected = torch_logits(exported.model, images, result.policy)
            np.testing.assert_allclose(result.logits, expected, atol=1e-4)
        assert len(runtime.graph_choice.speculation.runs) >= 2


def test_modes_that_are_compared(driver, tiny, pixels):
    with Orchestrator.open(tiny.bundle, **PLACE, strategy="graph", paths=MASKS) as runtime:
        runtime.run(pixels(tiny.model, 3))


@pytest.mark.parametrize(
    ("name", "stream"),
    [*((name, CALLER) for name in STRATEGIES), *(("chain", stream) for stream in (BLOCKING, PER_THREAD_STREAM, None))],
)
def test_images_of_the_device_and_logits_that_are_read_late(driver, tiny, preprocessed, torch_logits, name, stream):
    images = preprocessed(tiny.model, 5)
    runtime, keep = _open(tiny.bundle, name)
    with runtime:
        late = [GpuImages(driver, images, stream).run(runtime, keep) for _ in range(2)]
        for result in late:
            _read(driver, result.logits)
        runtime.run(images[:2], policy=None if keep is None else keep[:2])
        late += [GpuImages(driver, images[:n], stream).run(runtime) for n in (1, 5)]
    del runtime
    gc.collect()
    for result in late:
        expected = torch_logits(tiny.model, images[: len(result.policy)], None if keep is None else result.policy)
        np.testing.assert_allclose(_read(driver, result.logits, OTHER), expected, atol=1e-4)


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_engines_are_given_back_when_their_work_is_done(driver, tiny, preprocessed, name, closes):
    """Where images come from the device and no bits are read back, the host has waited for nothing."""
    images = GpuImages(driver, preprocessed(tiny.model, 3))
    runtime, keep = _open(tiny.bundle, name)
    logits = images.run(runtime, None if keep is None else keep[:3]).logits
    if closes:
        runtime.close()
    del runtime
    gc.collect()
    _read(driver, logits)


@pytest.mark.parametrize("name", ["chain", "full", "full@off"])
def test_buffers_of_too_many_batch_sizes_are_given_back(driver, tiny, preprocessed, name):
    images = preprocessed(tiny.model, 10)
    runtime, keep = _open(tiny.bundle, name)
    with runtime:
        for n_images in range(1, 11):
            GpuImages(driver, images[:n_images]).run(runtime, None if keep is None else "101")


def test_batch_in_slices(driver, tiny, preprocessed):
    images = np.resize(preprocessed(tiny.model, 4), (70, 3, 32, 32))
    runtime, _ = _open(tiny.bundle, "chain")
    with runtime:
        logits = GpuImages(driver, images).run(runtime, "101").logits
    _read(driver, logits, OTHER)


@pytest.mark.parametrize("name", ["chain", "graph@switch"])
def test_image_behind_one_that_failed(driver, tiny, pixels, name):
    """Its copy may be under way."""
    images = pixels(tiny.model, 2)
    runtime, keep = _open(tiny.bundle, name)
    with runtime:
        runtime.run(images[:1], policy=keep[0])
        driver.failing, FakeTensorRT.notes["failing"] = "cuGraphLaunch", "Error Code 1"
        with pytest.raises(EngineError):
            runtime.run(images[1:], policy=keep[1])
        driver.failing = FakeTensorRT.notes["failing"] = None
        runtime.run(images[:1], policy=keep[0])


@pytest.mark.parametrize("name", STRATEGIES)
def test_threads_that_share_a_runtime(driver, tiny, preprocessed, torch_logits, name):
    images, failed = preprocessed(tiny.model, 5), []
    runtime, keep = _open(tiny.bundle, name)
    expected = torch_logits(tiny.model, images, keep)

    def run(stream):
        for _ in range(2):
            given = images if stream is None else GpuImages(driver, images, stream)
            logits = runtime.run(given, policy=keep).logits
            found = logits if stream is None else _read(driver, logits, stream)
            failed.append(not np.allclose(found, expected, atol=1e-4))

    with runtime:
        threads = [threading.Thread(target=run, args=(stream,)) for stream in (None, CALLER, None, OTHER)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == [False] * 8


def test_runtimes_that_share_a_device(driver, tiny, preprocessed):
    images = preprocessed(tiny.model, 3)
    runtimes = [_open(tiny.bundle, name)[0] for name in ("chain", "full", "graph@switch", "graph@policy-cache")]
    late = [GpuImages(driver, images).run(runtime).logits for runtime in runtimes for _ in range(2)]
    given = GpuImages(driver, images)
    late += [runtime.run(given).logits for runtime in runtimes]
    while runtimes:
        runtimes.pop().close()
        gc.collect()
    for logits in late:
        _read(driver, logits)


@pytest.mark.parametrize("name", STRATEGIES)
def test_times_by_events(driver, tiny, pixels, name):
    runtime, keep = _open(tiny.bundle, name)
    with runtime:
        run_instrumented(name.partition("@")[0], runtime, Workload(images=pixels(tiny.model, 5), keep=keep), batch=3)

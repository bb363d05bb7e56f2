"""Strategy `graph`: one launch an image, and the policy never on the host. Against stand-ins that really compute.

The stand-in for the driver runs the graph that it was given: captured engine calls, the dispatch kernel's Python twin,
and of each SWITCH the body that the twin chose.
"""

import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdtool import Orchestrator
from bdtool.errors import BackendError, EngineError, UsageError
from bdtool.runtime.controllers import MaskController
from bdtool.runtime.factory import strategies_for
from bdtool.specs import TensorSpec
from engines import torch_graph
from engines.cuda_device import CudaDevice
from engines.libcuda import Driver, Gpu
from engines.network_graphs import NetworkGraphs
from engines.torchrt import TorchBackend, TorchEngine
from export.bundle import Bundle
from export.check import OnnxReference
from tests.fake_driver import FakeDriver
from tests.fake_tensorrt import FakeTensorRT, IExecutionContext, install_gpu

TENSORRT = {"backend": "tensorrt", "device": "cuda:0", "strategy": "graph", "cuda_graph": "switch"}


@pytest.fixture(scope="module")
def opened(tiny, tmp_path_factory):
    """(the driver, an orchestrator with strategy graph) on engines of their own."""
    with pytest.MonkeyPatch.context() as patch:
        driver = install_gpu(patch, tmp_path_factory.mktemp("cache"))
        with Orchestrator.open(tiny.bundle, **TENSORRT) as runtime:
            yield driver, runtime


@given(keep=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_given_bits_run_what_pytorch_runs(opened, tiny, pixels, preprocessed, torch_logits, keep):
    images = preprocessed(tiny.model, len(keep))
    result = opened[1].run(pixels(tiny.model, len(keep)), policy=keep)
    np.testing.assert_array_equal(result.policy, keep)
    np.testing.assert_allclose(result.logits, torch_logits(tiny.model, images, np.array(keep)), atol=1e-4)


def test_learned_policy_decides_as_pytorch(opened, tiny, pixels, preprocessed, torch_logits):
    images = preprocessed(tiny.model, 16)
    result = opened[1].run(pixels(tiny.model, 16))
    with torch.inference_mode():
        probability = tiny.model.keep_probability(torch.from_numpy(images)).numpy()
    np.testing.assert_array_equal(result.policy, probability >= 0.5)
    assert len(np.unique(result.policy, axis=0)) > 1
    np.testing.assert_allclose(result.logits, torch_logits(tiny.model, images, result.policy), atol=1e-4)


def test_image_is_one_launch_and_no_engine_call_of_the_host(opened, tiny, pixels):
    driver, runtime = opened
    image = pixels(tiny.model, 1)
    runtime.run(image)
    driver.copies.clear()
    enqueued, launched = FakeTensorRT.notes["enqueued"], len(driver.launched)
    waits = driver.calls["cuStreamSynchronize"]
    runtime.run(image)
    assert driver.calls["cuStreamSynchronize"] == waits + 1  # both copies are under way by then
    assert len(driver.launched) == launched + 1
    assert FakeTensorRT.notes["enqueued"] == enqueued
    assert driver.copies == ["HtoD", "DtoH", "DtoH"]  # image in, keep bits and logits out


def test_given_bits_are_copied_when_they_change(opened, tiny, pixels, preprocessed, torch_logits):
    driver, runtime = opened
    image = pixels(tiny.model, 1)
    learned, counts = runtime.run(image).logits, []
    for keep in ("101", "101", "100", None, None, "100"):
        driver.copies.clear()
        logits = runtime.run(image, policy=keep).logits
        counts.append(driver.copies.count("HtoD"))
        bits = None if keep is None else np.array([[bit == "1" for bit in keep]])
        expected = learned if bits is None else torch_logits(tiny.model, preprocessed(tiny.model, 1), bits)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert counts == [2, 1, 2, 2, 1, 2]  # with the image's


def test_captured_graphs_are_given_back_and_the_whole_one_is_kept(opened):
    driver, _ = opened
    [whole] = driver.instantiated
    # policy, stem, three blocks and two shortcuts in both directions, head from both buffers
    assert len(driver.destroyed) == 2 + 2 * (3 + 2) + 2
    assert whole not in driver.destroyed


def test_policy_has_scratch_memory_of_its_own(opened):
    scratch = [array for array in opened[0].memory.values() if array.nbytes == 4096]
    assert len(scratch) == 2  # the policy runs beside the stem


def test_probability_that_is_not_finite_is_refused(monkeypatch, tmp_path, tiny):
    install_gpu(monkeypatch, tmp_path)
    image = np.full((1, 3, 32, 32), np.nan, np.float32)
    refused = pytest.raises(EngineError, match=r"probabilities are not finite \(block 0\)")
    with Orchestrator.open(tiny.bundle, **TENSORRT) as runtime, refused:
        runtime.run(image)


def test_timed_orchestrator_sees_the_one_launch(opened, tiny, pixels):
    seen = []
    with opened[1].timed(lambda part, call: lambda: (seen.append(part.name), call())) as timed:
        timed.run(pixels(tiny.model, 1), policy="101")
    assert seen == ["graph"]


def test_controller_that_decides_on_the_way_is_refused(opened, tiny, preprocessed):
    class Gate:
        mask = None

    with pytest.raises(UsageError, match="strategy 'graph' decides inside its engine"):
        opened[1].run_with(preprocessed(tiny.model, 1), Gate())


def test_network_without_a_policy_runs_given_bits(monkeypatch, tmp_path, export_random, preprocessed, torch_logits):
    exported = export_random("resnet14", has_policy=False)
    install_gpu(monkeypatch, tmp_path)
    images = preprocessed(exported.model, 2)
    keep = np.array([[1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=bool)
    with Orchestrator.open(exported.bundle, **TENSORRT) as runtime:
        np.testing.assert_allclose(
            runtime.run(images, policy=keep).logits, torch_logits(exported.model, images, keep), atol=1e-4
        )
        np.testing.assert_array_equal(runtime.run(images).policy, np.ones((2, 6)))


def test_closing_gives_everything_back(monkeypatch, tmp_path, tiny, pixels, preprocessed):
    driver = install_gpu(monkeypatch, tmp_path)
    with Orchestrator.open(tiny.bundle, **TENSORRT) as runtime:
        runtime.run(pixels(tiny.model, 1))
        assert len(driver.instantiated) == 1
        runtime.run(preprocessed(tiny.model, 1))  # has a graph of its own
        of_pixels, of_prepared = driver.instantiated
    del runtime
    gc.collect()
    for whole in (of_pixels, of_prepared):
        assert driver.destroyed.count(whole) == 2  # the graph, and what was made of it to launch
    assert (driver.memory, driver.host_memory) == ({}, {})


def test_work_that_no_graph_may_hold_is_named(monkeypatch, tmp_path, tiny):
    driver = install_gpu(monkeypatch, tmp_path)
    capture = driver.cuStreamEndCapture

    def with_allocation(stream):
        status, graph = capture(stream)
        driver.kinds[int(graph)] = ["KERNEL", "MEM_ALLOC"]
        return status, graph

    monkeypatch.setattr(driver, "cuStreamEndCapture", with_allocation, raising=False)
    with pytest.raises(EngineError, match="stem: its captured work holds MEM_ALLOC nodes"):
        Orchestrator.open(tiny.bundle, **TENSORRT)


def test_engine_that_the_library_does_not_let_capture_is_named(monkeypatch, tmp_path, tiny):
    install_gpu(monkeypatch, tmp_path, rtx=True)
    monkeypatch.setattr(IExecutionContext, "is_stream_capturable", lambda self, stream: False, raising=False)
    with pytest.raises(EngineError, match=r"part 'policy'.* cannot be captured in a CUDA graph. Use --strat") as said:
        Orchestrator.open(tiny.bundle, **{**TENSORRT, "backend": "tensorrt-rtx"})
    assert str(said.value).count("policy") == 1


def test_part_is_named_where_the_driver_says_something_like_it(opened, monkeypatch):
    runtime = opened[1]
    capturer = type(runtime._backend.capturer())
    capture = capturer.capture

    def refused_stem(self, engine, inputs, outputs, *, beside):
        if engine is runtime._forms.loaded.engines["stem"]:
            raise EngineError("cuStreamEndCapture: system not yet initialized")
        return capture(self, engine, inputs, outputs, beside=beside)

    monkeypatch.setattr(capturer, "capture", refused_stem)
    with pytest.raises(
        EngineError, match=r"part 'stem': cannot be captured: cu.*: system not yet .* Use --strategy chain"
    ):
        NetworkGraphs(runtime.network, runtime._backend, runtime._forms.loaded.engines)


def test_engines_that_no_graph_can_capture_are_refused(fake):
    with pytest.raises(UsageError, match="needs engines that can be captured: --backend torch or tensorrt"):
        fake(strategy="graph")


def test_block_that_writes_for_a_controller_is_refused(opened):
    runtime = opened[1]
    first, score = runtime.network.blocks[0], TensorSpec(name="score", shape=("N", 1))
    writing = replace(first, writes=(*first.writes, "score"), outputs=(*first.outputs, score))
    parts = tuple(writing if part is first else part for part in runtime.network.parts)
    with pytest.raises(UsageError, match="decides before block 0; block_00 has outputs for a controller"):
        NetworkGraphs(replace(runtime.network, parts=parts), runtime._backend, runtime._forms.loaded.engines)


# --- where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "device", "driver", "message"),
    [
        ("onnxruntime", "cpu", Driver(), r"runs on --backend torch, tensorrt, tensorrt-rtx with --device cuda:N; got"),
        ("torch", "cpu", Driver(), "got backend 'torch' on device 'cpu'"),
        (
            "torch",
            "cuda:0",
            Driver(error="no NVIDIA driver"),
            "device 'cuda:0': no NVIDIA driver. See `bdtool doctor`",
        ),
    ],
)
def test_machine_that_lacks_something_is_told_what(monkeypatch, bundle_copy, backend, device, driver, message):
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: driver)
    with pytest.raises((UsageError, BackendError), match=message):
        Orchestrator.open(bundle_copy, backend=backend, device=device, strategy="graph")
    assert not (bundle_copy / "engines").exists()
    assert "graph" not in strategies_for(backend, device)


def test_auto_measures_what_the_backend_has(monkeypatch):
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: Driver((13, 0), (Gpu("H200", (9, 0)),)))
    assert strategies_for("onnxruntime", "cpu") == ("chain", "path", "fused", "full")
    assert strategies_for("torch", "cuda:0") == ("chain", "path", "graph", "full")
    assert strategies_for("tensorrt", "cuda:0") == ("chain", "graph", "full")
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: Driver((11, 8), (Gpu("H200", (9, 0)),)))
    assert strategies_for("torch", "cuda:0") == ("chain", "path", "full"), "without any CUDA graph it is the chain"


# --- PyTorch ----------------------------------------------------------------------------------------------------------


class FakeCudaGraph:
    def __init__(self, keep_graph):
        assert keep_graph

    def raw_cuda_graph(self):
        return self.raw


class FakeStream(str):
    def wait_stream(self, other):
        assert other.cuda_stream == 0


@pytest.fixture
def torch_on_a_stand_in(monkeypatch):
    """PyTorch on the CPU whose bound calls go through the stand-in driver, as those on a GPU through the stream."""
    driver = FakeDriver()
    bind, allocate = TorchEngine.bind, TorchBackend.allocate

    def bound(self, inputs, outputs):
        call = bind(self, inputs, outputs)
        return lambda: driver.enqueue(call)

    def allocated(self, shape, dtype):
        buffer = allocate(self, shape, dtype)
        raw = buffer.tensor.permute(0, 2, 3, 1) if buffer.tensor.dim() == 4 else buffer.tensor
        driver.memory[buffer.tensor.data_ptr()] = raw.numpy().view(np.uint8).reshape(-1)
        return buffer

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert (stream, capture_error_mode) == ("stream of GPU 0", "thread_local")
        driver.pools.append(pool)
        driver.cuStreamBeginCapture(0x5, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        yield
        graph.raw = int(driver.cuStreamEndCapture(0x5)[1])

    driver.pools, driver.current_stream = [], 0
    monkeypatch.setattr(TorchEngine, "bind", bound)
    monkeypatch.setattr(TorchBackend, "allocate", allocated)
    handles = iter(("one after the other", "beside"))
    for name, value in {
        "CUDAGraph": FakeCudaGraph,
        "graph": capture,
        "graph_pool_handle": lambda: next(handles),
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "Stream": lambda device: FakeStream(f"stream of GPU {device}"),
        "synchronize": lambda: None,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=driver.current_stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("engines.torchrt.open_device", lambda device, stream: CudaDevice(driver, 0, stream=stream))
    return driver


def test_torch_graph_runs_what_pytorch_runs(torch_on_a_stand_in, tiny, preprocessed, torch_logits):
    driver, bundle = torch_on_a_stand_in, Bundle.open(tiny.bundle)
    network, backend = bundle.network, TorchBackend()
    engines = {p.name: backend.load(p, bundle.part_path(p).read_bytes(), layout="NCHW") for p in network.parts}
    runtime = Orchestrator(network, backend, engines, strategy="graph", max_batch=8)
    assert driver.pools.count("beside") == 1  # the policy, which runs beside the stem
    images = preprocessed(tiny.model, 8)
    keep = np.array([[k >> i & 1 for i in range(3)] for k in range(8)], dtype=bool)
    np.testing.assert_allclose(
        runtime.run(images, policy=keep).logits, torch_logits(tiny.model, images, keep), atol=1e-4, rtol=1e-4
    )
    learned = runtime.run_with(images, MaskController(None, threshold=0.5))
    policy = network.require("policy")
    [probability] = OnnxReference(bundle.part_path(policy).read_bytes()).run({policy.inputs[0].name: images}).values()
    np.testing.assert_array_equal(learned.policy, probability >= 0.5)
    assert len(driver.launched) == 16
    driver.current_stream = 0x77  # as within `with torch.cuda.stream(...)`: the copies go there, too
    runtime.run(images[:1])
    assert driver.launched_on[-2:] == [0, 0x77]


def test_torch_that_captured_nothing_is_an_error(torch_on_a_stand_in, monkeypatch, tiny):
    driver, bundle, backend = torch_on_a_stand_in, Bundle.open(tiny.bundle), TorchBackend()
    monkeypatch.setattr(driver, "cuGraphGetNodes", lambda graph, count: driver._done("", [], 0), raising=False)
    parts = bundle.network.parts
    engines = {p.name: backend.load(p, bundle.part_path(p).read_bytes(), layout="NCHW") for p in parts}
    with pytest.raises(EngineError, match="PyTorch captured no work"):
        Orchestrator(bundle.network, backend, engines, strategy="graph", max_batch=8)


@pytest.mark.parametrize("was_enabled", [True, False])
def test_nothing_is_collected_while_torch_captures(torch_on_a_stand_in, monkeypatch, tiny, was_enabled):
    """What a cycle gives back waits for the device, which a capture does not survive."""
    enqueue, seen = torch_on_a_stand_in.enqueue, []

    def noted(work):
        if torch_on_a_stand_in._capturing is not None:
            seen.append(gc.isenabled())
        enqueue(work)

    monkeypatch.setattr(torch_on_a_stand_in, "enqueue", noted)
    bundle, backend = Bundle.open(tiny.bundle), TorchBackend()
    parts = bundle.network.parts
    engines = {p.name: backend.load(p, bundle.part_path(p).read_bytes(), layout="NCHW") for p in parts}
    (gc.enable if was_enabled else gc.disable)()
    try:
        Orchestrator(bundle.network, backend, engines, strategy="graph", max_batch=8)
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
    assert set(seen) == {False}


def test_torch_that_cannot_capture_is_quoted(torch_on_a_stand_in, monkeypatch, tiny):
    @contextmanager
    def refused(graph, pool, stream, capture_error_mode):
        yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch_graph.torch.cuda, "graph", refused)
    bundle, backend = Bundle.open(tiny.bundle), TorchBackend()
    parts = bundle.network.parts
    engines = {p.name: backend.load(p, bundle.part_path(p).read_bytes(), layout="NCHW") for p in parts}
    with pytest.raises(EngineError, match="PyTorch cannot capture its work in a CUDA graph: CUDA error: operation not"):
        Orchestrator(bundle.network, backend, engines, strategy="graph", max_batch=8)

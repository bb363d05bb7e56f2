"""Running TensorRT engines, against stand-ins for TensorRT and the driver that compute on host memory."""

import gc
import re
import threading

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.errors import EngineError, UsageError
from bdtool.runtime.preprocess import preprocess
from engines.registry import open_backend
from tests.fake_tensorrt import (
    FakeTensorRT,
    ICudaEngine,
    ILogger,
    OnGpu,
    Runtime,
    build_engines,
    install_gpu,
)

TENSORRT = {"backend": "tensorrt", "device": "cuda:0"}
KEEP = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=bool)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    return install_gpu(monkeypatch, tmp_path / "cache")


@pytest.fixture
def notes(driver):
    return FakeTensorRT.notes


@pytest.mark.parametrize("form", ["pixels", "preprocessed"])
def test_logits_equal_pytorch_in_batches_and_alone(driver, tiny, bundle_copy, request, form, torch_logits):
    images = request.getfixturevalue(form)(tiny.model, len(KEEP))
    ready = preprocess(images, tiny.model.spec.preprocessing)
    expected = torch_logits(tiny.model, ready, KEEP)
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        np.testing.assert_allclose(runtime.run(images, policy=KEEP).logits, expected, atol=1e-4)
        for i, keep in enumerate(KEEP):
            alone = runtime.run(images[i : i + 1], policy=keep).logits
            np.testing.assert_allclose(alone[0], expected[i], atol=1e-4)
        learned = runtime.run(images)
    np.testing.assert_allclose(learned.logits, torch_logits(tiny.model, ready, learned.policy), atol=1e-4)
    with Orchestrator.open(bundle_copy, strategy="full", **TENSORRT) as runtime:
        np.testing.assert_allclose(runtime.run(images).logits, torch_logits(tiny.model, ready), atol=1e-4)


def test_half_precision_runs_channels_last(driver, tiny, bundle_copy, pixels, preprocessed, torch_logits):
    images = pixels(tiny.model, 2)
    with Orchestrator.open(bundle_copy, precision="fp16", **TENSORRT) as runtime:
        assert runtime.engine(runtime.network.part("block_00")).layout == "NHWC"
        logits = runtime.run(images, policy="101").logits
        prepared = runtime.run(preprocessed(tiny.model, 2), policy="101").logits
    expected = torch_logits(tiny.model, preprocessed(tiny.model, 2), KEEP[[0, 0]])
    np.testing.assert_allclose(logits, expected, atol=0.05)
    np.testing.assert_allclose(prepared, expected, atol=0.05)


@pytest.fixture
def chain(driver, bundle_copy, tiny, pixels):
    """An orchestrator whose engines have run once, and one image."""
    image = pixels(tiny.model, 1)
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        runtime.run(image, policy="101")
        yield runtime, image


def test_image_costs_one_copy_each_way_and_a_call_for_each_kept_block(chain, driver, notes):
    runtime, image = chain
    driver.copies.clear()
    notes["enqueued"] = 0
    runtime.run(image, policy="101")
    assert driver.copies == ["HtoD", "DtoH"]
    assert notes["enqueued"] == 2 + 1 + 2  # stem, head; the shortcut of the dropped block; two blocks


def test_contexts_and_scratch_are_shared(chain, driver, notes):
    runtime, image = chain
    contexts, blocks = notes["contexts"], len(driver.memory)
    runtime.run(image, policy="101")
    assert notes["contexts"] == contexts  # nothing is made while running
    assert len(driver.memory) == blocks
    assert sum(array.nbytes == 4096 for array in driver.memory.values()) == 1  # the scratch memory of all contexts
    pointed = notes["pointed"]
    runtime.run(image, policy="101")
    assert notes["pointed"] == pointed  # addresses stay where they were


def test_scratch_grows_with_what_is_loaded_later(chain, driver, tiny, preprocessed, monkeypatch):
    """A context must not be given less than its engine needs, which the stand-in asserts."""
    monkeypatch.setattr(ICudaEngine, "device_memory_size_v2", 8192)
    chain[0].run(preprocessed(tiny.model, 1), policy="101")
    assert 8192 in {array.nbytes for array in driver.memory.values()}


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("no kernel", ""),
        ("cudaError 2: out of memory", r"\. Free memory on the GPU: nvidia-smi lists who has it"),
        ("Myelin type has not implementation for fallback shapes: 5", r"\. Build it again with --max-batch 1"),
    ],
)
def test_context_that_the_library_does_not_make_is_quoted(
    driver, tiny, bundle_copy, pixels, monkeypatch, reason, advice
):
    def fail(self, allocation):
        self.runtime.log.log(ILogger.ERROR, reason)

    monkeypatch.setattr(ICudaEngine, "create_execution_context", fail)
    with pytest.raises(EngineError, match=rf"part '\w+': tensorrt makes no execution context: {reason}{advice}$"):
        Orchestrator.open(bundle_copy, **TENSORRT).run(pixels(tiny.model, 1))


def test_memory_is_given_back(driver, bundle_copy, tiny, preprocessed):
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        runtime.run(preprocessed(tiny.model, 4), policy=KEEP[:4])
        assert driver.memory
    del runtime
    gc.collect()
    assert (driver.memory, driver.host_memory) == ({}, {})


@pytest.mark.parametrize("strategy", ["chain", "graph"])
def test_engines_are_destroyed_on_their_gpu_whichever_thread_lets_them_go(
    driver, bundle_copy, tiny, pixels, preprocessed, strategy
):
    """Without a context that is current CUDA would take GPU 0, and start a context there."""
    held = [Orchestrator.open(bundle_copy, strategy=strategy, **TENSORRT)]
    held[0].run(pixels(tiny.model, 1))
    held[0].run(preprocessed(tiny.model, 1))

    def let_go():
        held.pop().close()
        gc.collect()
        assert driver.contexts == []

    thread = threading.Thread(target=let_go)
    thread.start()
    thread.join()
    assert not [one for one in gc.get_objects() if issubclass(type(one), OnGpu) and one.driver is driver]
    assert driver.astray == []


def test_engines_that_are_refused_are_destroyed_on_their_gpu(driver, tiny_bundle, monkeypatch):
    backend = open_backend("tensorrt", "cuda:0")
    head, stem = tiny_bundle.network.part("head"), tiny_bundle.network.part("stem")
    data = backend.build(stem, tiny_bundle.part_path(stem).read_bytes(), layout="NCHW").data
    for _ in range(2):
        with pytest.raises(EngineError, match="build it again"):
            backend.load(head, data, layout="NCHW")
    monkeypatch.setattr(ICudaEngine, "device_memory_size_v2", 8192)
    engine = backend.load(stem, data, layout="NCHW")
    driver.failing = "cuMemAlloc"  # of larger scratch memory, when the execution context is there already
    with pytest.raises(EngineError, match="refuses 8192 bytes of memory"):
        engine.bind({}, {})
    del engine
    gc.collect()
    assert driver.astray == []


def test_engine_that_fails_is_named_and_quoted(chain, notes):
    runtime, image = chain
    notes["failing"] = "Error Code 1: Cask (shader run failed)"
    with pytest.raises(EngineError, match="part 'stem': tensorrt does not run it: Error Code 1: Cask"):
        runtime.run(image, policy="101")


def test_copy_that_fails_is_an_error(chain, driver):
    runtime, image = chain
    driver.failing = "cuStreamSynchronize"
    with pytest.raises(EngineError, match="refuses to finish the work enqueued: CUDA_ERROR_INVALID_VALUE"):
        runtime.run(image, policy="101")


def test_engine_by_itself_refuses_a_batch_below_its_profile(driver, bundle_copy, tiny, pixels):
    build_engines(bundle_copy, min_batch=2, opt_batch=2, max_batch=4)
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        stem = runtime.engine(runtime.network.require("stem"))
        with pytest.raises(EngineError, match=r"input 'image': got batch 1, its engine takes 2 to 4\. Build it again"):
            stem.run({"image": pixels(tiny.model, 1)})


@pytest.mark.parametrize("form", ["pixels", "preprocessed"])
@pytest.mark.parametrize(("least", "most"), [(4, 4), (3, 8)])
def test_fewer_images_than_engines_take_are_filled_up(
    driver, bundle_copy, tiny, request, torch_logits, form, least, most
):
    """Static engines, and a profile that begins above one image; blocks that one image of the batch keeps, too."""
    build_engines(bundle_copy, min_batch=least, opt_batch=least, max_batch=most)
    images = request.getfixturevalue(form)(tiny.model, len(KEEP))
    ready = preprocess(images, tiny.model.spec.preprocessing)
    expected = torch_logits(tiny.model, ready, KEEP)
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        assert runtime.min_batch == least
        for n in range(1, len(KEEP) + 1):
            ran = runtime.run(images[:n], policy=KEEP[:n])
            np.testing.assert_allclose(ran.logits, expected[:n], atol=1e-4)
            np.testing.assert_array_equal(ran.policy, KEEP[:n])
            np.testing.assert_array_equal(runtime.run(images[:n]).policy, runtime.decide(images)[:n])
    with Orchestrator.open(bundle_copy, strategy="full", **TENSORRT) as runtime:
        full = runtime.run(images[:1])
    np.testing.assert_allclose(full.logits, torch_logits(tiny.model, ready[:1]), atol=1e-4)


def test_graphs_are_of_single_images(driver, bundle_copy):
    build_engines(bundle_copy, min_batch=4, opt_batch=4, max_batch=4)
    with pytest.raises(UsageError, match=r"'graph' runs single images, the engines take 4 at least\. Use --str"):
        Orchestrator.open(bundle_copy, strategy="graph", **TENSORRT)


def test_engine_file_that_cannot_be_read_back_is_quoted(driver, tiny_bundle):
    backend = open_backend("tensorrt", "cuda:0")
    with pytest.raises(EngineError, match=r"part 'stem': tensorrt 10\.14\.1 cannot load its engine: Serialization as"):
        backend.load(tiny_bundle.network.part("stem"), b"no plan", layout="NCHW")


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("CUDA initialization failure with error: 35", "The driver is too old for this library, or there is none"),
        ("Error Code 2: OutOfMemory (Requested size was 64 bytes.)", "Free memory on the GPU: nvidia-smi lists"),
        ("Error Code 1: Cuda Runtime (cudaError 719: launch failure)", "Work on the GPU failed, and this process"),
        ("Serialization assertion failed, error 351", "Build it again on this machine"),
    ],
)
def test_engine_that_is_whole_is_not_to_be_built_again(driver, tiny_bundle, monkeypatch, reason, remedy):
    backend = open_backend("tensorrt", "cuda:0")
    monkeypatch.setattr(Runtime, "deserialize_cuda_engine", lambda self, data: self.log.log(ILogger.ERROR, reason))
    with pytest.raises(EngineError, match=rf"cannot load its engine: {re.escape(reason)}\. {remedy}"):
        backend.load(tiny_bundle.network.part("stem"), b"no plan", layout="NCHW")


def test_engine_of_another_part_is_refused(driver, tiny_bundle):
    backend = open_backend("tensorrt", "cuda:0")
    head, stem = tiny_bundle.network.part("head"), tiny_bundle.network.part("stem")
    built = backend.build(stem, tiny_bundle.part_path(stem).read_bytes(), layout="NCHW")
    with pytest.raises(EngineError, match=r"part 'head': its engine has tensors \{'image': 'float32'.*build it again"):
        backend.load(head, built.data, layout="NCHW")


@pytest.mark.parametrize("strategy", ["path", "fused"])
def test_strategies_that_tensorrt_lacks_are_refused(driver, bundle_copy, strategy):
    with pytest.raises(UsageError, match=f"'tensorrt' has no strategy '{strategy}', only chain, graph, full; or use"):
        Orchestrator.open(bundle_copy, strategy=strategy, **TENSORRT)
    assert not (bundle_copy / "engines").exists()


def test_batches_beyond_what_engines_take_run_in_slices(driver, bundle_copy, tiny, pixels, torch_logits):
    build_engines(bundle_copy, max_batch=2)
    images = pixels(tiny.model, len(KEEP))
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        logits = runtime.run(images, policy=KEEP).logits
    ready = preprocess(images, tiny.model.spec.preprocessing)
    np.testing.assert_allclose(logits, torch_logits(tiny.model, ready, KEEP), atol=1e-4)

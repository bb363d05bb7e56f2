"""The baseline `full` on a GPU: one launch of a CUDA graph, or plain launches and the reason. On stand-ins."""

import gc

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.errors import BackendError, EngineError, UsageError
from engines.libcuda import Driver, Gpu
from tests.fake_tensorrt import FakeTensorRT, install_gpu

PLACE = {"backend": "tensorrt", "device": "cuda:0", "strategy": "full"}


@pytest.fixture
def driver(monkeypatch, tmp_path):
    return install_gpu(monkeypatch, tmp_path)


def _enqueued():
    return FakeTensorRT.notes.get("enqueued", 0)


def test_batch_is_one_launch_of_what_pytorch_computes(driver, tiny, preprocessed, torch_logits):
    images = preprocessed(tiny.model, 5)
    with Orchestrator.open(tiny.bundle, **PLACE) as runtime:
        runtime.run(images)  # captures
        enqueued, launched = _enqueued(), len(driver.launched)
        logits = runtime.run(images).logits
        assert (_enqueued(), len(driver.launched)) == (enqueued, launched + 1)
        assert runtime.graph_choice.mode == "replay"
        alone = runtime.run(images[:1]).logits
    np.testing.assert_allclose(logits, torch_logits(tiny.model, images), atol=1e-4)
    np.testing.assert_allclose(alone, logits[:1], atol=1e-4)


def test_off_launches_the_same_plainly(driver, tiny, preprocessed, torch_logits):
    images = preprocessed(tiny.model, 3)
    with Orchestrator.open(tiny.bundle, **PLACE, cuda_graph="off") as runtime:
        np.testing.assert_allclose(runtime.run(images).logits, torch_logits(tiny.model, images), atol=1e-4)
        assert (runtime.graph_choice.mode, runtime.graph_choice.reason) == ("off", "asked for")
    assert driver.launched == []


def test_work_that_cannot_be_captured_runs_plainly_and_says_why(driver, tiny, preprocessed, torch_logits):
    driver.failing = "cuGraphInstantiateWithParams"
    images = preprocessed(tiny.model, 2)
    with Orchestrator.open(tiny.bundle, **PLACE) as runtime:
        np.testing.assert_allclose(runtime.run(images).logits, torch_logits(tiny.model, images), atol=1e-4)
        assert runtime.graph_choice.mode == "off"
        assert "CUDA_ERROR_INVALID_VALUE" in runtime.graph_choice.reason


def test_where_nothing_can_be_captured_it_runs_plainly_and_says_why(
    driver, monkeypatch, tiny, preprocessed, torch_logits
):
    """As where cuda-bindings are installed and cannot be imported: backend `torch` runs without."""

    def fail(backend):
        raise BackendError("cuda-bindings cannot be imported")

    images = preprocessed(tiny.model, 2)
    with Orchestrator.open(tiny.bundle, **PLACE) as runtime:
        monkeypatch.setattr(type(runtime._backend), "capturer", fail)
        np.testing.assert_allclose(runtime.run(images).logits, torch_logits(tiny.model, images), atol=1e-4)
        assert (runtime.graph_choice.mode, runtime.graph_choice.reason) == ("off", "cuda-bindings cannot be imported")


def test_graph_that_was_asked_for_and_cannot_be_is_an_error(driver, tiny, preprocessed):
    driver.failing = "cuGraphInstantiateWithParams"
    with (
        Orchestrator.open(tiny.bundle, **PLACE, cuda_graph="path-cache") as runtime,
        pytest.raises(EngineError, match="CUDA_ERROR_INVALID_VALUE"),
    ):
        runtime.run(preprocessed(tiny.model, 1))


def test_driver_without_graphs_runs_plainly_and_says_why(driver, monkeypatch, tiny, preprocessed):
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: Driver((11, 8), (Gpu("A", (8, 0)),)))
    with Orchestrator.open(tiny.bundle, **PLACE) as runtime:
        runtime.run(preprocessed(tiny.model, 1))
        expected = "the driver supports CUDA up to 11.8, a CUDA graph needs 12.0; update the driver"
        assert (runtime.graph_choice.mode, runtime.graph_choice.reason) == ("off", expected)
    with pytest.raises(
        BackendError, match=r"CUDA graph mode 'switch'.*needs 12\.8; update the driver\. Or use .*: off"
    ):
        Orchestrator.open(tiny.bundle, **PLACE, cuda_graph="switch")


def test_graphs_of_many_batch_sizes_are_given_back(driver, tiny, preprocessed):
    images = preprocessed(tiny.model, 10)
    with Orchestrator.open(tiny.bundle, **PLACE) as runtime:
        for n_images in range(1, 11):
            runtime.run(images[:n_images])
        gc.collect()
        assert len(driver.instantiated) == 10
        assert set(driver.instantiated) <= set(driver.destroyed)  # what was captured is not needed any more
        assert len(driver.ended) == 2  # of the batch sizes that are not kept
    del runtime
    gc.collect()
    assert (driver.memory, driver.host_memory) == ({}, {})


def test_graph_of_the_batch_size_used_last_is_kept(driver, tiny, preprocessed):
    images = preprocessed(tiny.model, 10)
    with Orchestrator.open(tiny.bundle, **PLACE) as runtime:
        for n_images in range(1, 11):
            runtime.run(images[:n_images])
            runtime.run(images[:1])
        assert len(driver.instantiated) == 10  # each once: that of one image was never dropped


@pytest.mark.parametrize("mode", ["switch", "sometimes"])
def test_mode_that_does_not_fit_is_refused(tiny, mode):
    with pytest.raises(
        UsageError, match=f"CUDA graph mode '{mode}' runs on --backend torch, tensorrt, tensorrt-rtx with"
    ):
        Orchestrator.open(tiny.bundle, strategy="full", cuda_graph=mode)


def test_unknown_mode_lists_the_known_ones(driver, tiny):
    with pytest.raises(UsageError, match="unknown CUDA graph mode 'fast'; this version has auto, policy-cache, switch"):
        Orchestrator.open(tiny.bundle, **PLACE, cuda_graph="fast")


def test_on_the_cpu_there_is_no_choice(tiny):
    with Orchestrator.open(tiny.bundle, strategy="full", cuda_graph="off") as runtime:
        assert runtime.graph_choice is None

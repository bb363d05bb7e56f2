"""Running TensorRT-RTX engines: what differs from TensorRT's, against the same stand-ins."""

import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.errors import EngineError, UsageError
from engines.cuda_device import CudaDevice
from engines.libcuda import driver_from_libcuda
from engines.registry import open_backend
from engines.rtx_cache import RuntimeCache
from engines.trt_library import load_library
from engines.trt_options import TensorRTOptions
from engines.trt_runtime import TensorRTRuntime
from export.files import write_bytes
from tests.fake_driver import FakeDriver
from tests.fake_tensorrt import FakeTensorRT, IExecutionContext, IRuntimeCache, build_engines, install_gpu

RTX = {"backend": "tensorrt-rtx", "device": "cuda:0"}
KEEP = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=bool)


@pytest.fixture
def rtx(monkeypatch, tmp_path):
    return install_gpu(monkeypatch, tmp_path / "cache", rtx=True, sm=89)


def test_rtx_compiles_at_once_and_keeps_what_it_compiled(
    rtx, bundle_copy, tiny, pixels, preprocessed, torch_logits, tmp_path
):
    images = preprocessed(tiny.model, 2)
    with Orchestrator.open(bundle_copy, **RTX) as runtime:
        logits = runtime.run(images, policy="101").logits
    np.testing.assert_allclose(logits, torch_logits(tiny.model, images, KEEP[[0, 0]]), atol=1e-4)
    config = FakeTensorRT.notes["runtime_config"]
    assert (config.cuda_graph_strategy, config.dynamic_shapes_kernel_specialization_strategy) == ("DISABLED", "EAGER")
    del runtime, config
    FakeTensorRT.notes.pop("runtime_config")
    gc.collect()
    [file] = (tmp_path / "cache" / "bdtool" / "runtime").glob("*.cache")
    assert file.name == "NVIDIA-H200-cuda13.0-tensorrt-rtx1.7.1.cache"
    compiled = set(file.read_bytes().decode().split()[1:])
    assert len(compiled) > 1
    with Orchestrator.open(bundle_copy, strategy="full", **RTX) as runtime:  # which is one engine
        runtime.run(pixels(tiny.model, 1))
        assert FakeTensorRT.notes["runtime_config"].cache.kernels >= compiled  # it began with what was kept


def opened_cache(path):
    """Return a runtime's cache in the file, and the library's object, as they are when the first engine has run."""
    config = SimpleNamespace(create_runtime_cache=IRuntimeCache)
    config.set_runtime_cache = lambda cache: setattr(config, "cache", cache) or True
    cache = RuntimeCache(path)
    cache.apply(config)
    return cache, config.cache


def test_damaged_runtime_cache_is_not_taken(rtx, tmp_path):
    """The library would take it as it is, and then make no execution context."""
    path = tmp_path / "kernels.cache"
    with CudaDevice(rtx, 0).current():
        cache, library = opened_cache(path)
        library.kernels = {"stem"}
        cache.save()
        assert opened_cache(path)[1].kernels == {"stem"}
        path.write_bytes(path.read_bytes()[:-1] + b"7")
        assert opened_cache(path)[1].kernels == set()


def test_runtimes_that_were_open_at_once_keep_what_each_compiled(rtx, tmp_path):
    path = tmp_path / "kernels.cache"
    with CudaDevice(rtx, 0).current():
        first, second, idle = opened_cache(path), opened_cache(path), opened_cache(path)
        first[1].kernels = {"stem"}
        second[1].kernels = {"head"}
        for cache, _ in (first, second, idle):
            cache.save()
        assert opened_cache(path)[1].kernels == {"stem", "head"}
        first[1].kernels.add("block")  # and it knows nothing of "head"
        first[0].save()
        assert opened_cache(path)[1].kernels == {"stem", "head", "block"}


def test_runtime_that_is_collected_while_another_saves_waits_for_nobody(rtx, tmp_path, monkeypatch):
    """Its kernels are saved when it is collected: under the lock, which the same thread holds, that would never end."""
    path = tmp_path / "kernels.cache"
    device = CudaDevice(rtx, 0)
    with device.current():
        (kept, library), (lost, other) = opened_cache(path), opened_cache(path)
        library.kernels, other.kernels = {"stem"}, {"head"}
        runtime = type("Cycle", (), {})()
        runtime.itself = runtime
        device.on_collection(runtime, lost.save)
        del runtime
        monkeypatch.setattr("engines.rtx_cache.write_bytes", _writing_with_garbage(write_bytes))
        saving = threading.Thread(target=in_context, args=(device, kept.save), daemon=True)
        saving.start()
        saving.join(timeout=20)
        assert not saving.is_alive()
        gc.collect()
        assert opened_cache(path)[1].kernels == {"stem", "head"}


def in_context(device, call):
    with device.current():
        call()


def _writing_with_garbage(write):
    """Return `write`, as it is when there is so much garbage that Python collects it then, if it may."""

    def written(path, data):
        if gc.isenabled():
            gc.collect()
        write(path, data)

    return written


def test_runtime_cache_outlives_what_was_made_with_it(rtx, bundle_copy, tiny, preprocessed):
    gone, runtime = [], Orchestrator.open(bundle_copy, **RTX)
    runtime.run(preprocessed(tiny.model, 1), policy="101")
    cache = FakeTensorRT.notes.pop("runtime_config").cache
    weakref.finalize(cache, gone.append, "cache")
    contexts = [one for one in gc.get_objects() if type(one) is IExecutionContext]
    for context in contexts:
        weakref.finalize(context, gone.append, "context")
    n_contexts = len(contexts)
    del runtime, cache, contexts, context
    gc.collect()
    assert n_contexts > 1
    assert gone == ["context"] * n_contexts + ["cache"]


@pytest.mark.parametrize(("max_batch", "flags"), [(1, {"REQUIRE_USER_ALLOCATION"}), (2, set())])
def test_rtx_may_allocate_where_the_batch_is_dynamic(rtx, bundle_copy, max_batch, flags):
    build_engines(bundle_copy, "tensorrt-rtx", "cpu", sms=(89,), max_batch=max_batch)
    assert FakeTensorRT.notes["config"].flags_set == flags


def test_engines_for_several_architectures_serve_each_of_them(rtx, bundle_copy, tiny, pixels):
    store = build_engines(bundle_copy, "tensorrt-rtx", "cpu", sms=(89, 90))
    with Orchestrator.open(bundle_copy, **RTX) as runtime:
        assert runtime.run(pixels(tiny.model, 1)).logits.shape == (1, 10)
    assert [path.name for path in (bundle_copy / "engines").iterdir()] == ["tensorrt-rtx-1.7.1-sm89-sm90-fp32"]
    (store.directory / "block_00.plan").write_bytes(b"")  # not whole any more: then they are built for this one alone
    with Orchestrator.open(bundle_copy, **RTX):
        assert (bundle_copy / "engines" / "tensorrt-rtx-1.7.1-sm89-fp32" / "block_00.plan").is_file()


def test_preprocessed_images_run_by_engines_of_one_batch_size(
    rtx, monkeypatch, bundle_copy, tiny, preprocessed, torch_logits
):
    """As INT8 ones are, which would be built for single images where nobody says otherwise."""
    monkeypatch.setattr("engines.trt_options.has_one_batch", lambda backend, precision: True)
    for batch in (2, 1):
        static = {"min_batch": batch, "opt_batch": batch, "max_batch": batch}
        build_engines(bundle_copy, "tensorrt-rtx", "cpu", sms=(89,), **static)
        images = preprocessed(tiny.model, 2)
        with Orchestrator.open(bundle_copy, **RTX) as runtime:
            logits = runtime.run(images, policy="101").logits
        np.testing.assert_allclose(logits, torch_logits(tiny.model, images, KEEP[[0, 0]]), atol=1e-4)


def test_running_needs_a_device(rtx, bundle_copy):
    with pytest.raises(UsageError, match="backend 'tensorrt-rtx' runs its engines on a GPU: give --device cuda:0"):
        Orchestrator.open(bundle_copy, backend="tensorrt-rtx")


def test_real_library_cannot_load_an_engine_without_a_driver(tiny_bundle):
    """What a machine without a GPU can show of the real classes: the runtime starts, and refuses the engine."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra 'rtx'")
    if driver_from_libcuda().usable:
        pytest.skip("there is a GPU here")
    part = tiny_bundle.network.part("stem")
    backend = open_backend("tensorrt-rtx", "cpu", tensorrt=TensorRTOptions(sms=(89,)))
    data = backend.build(part, tiny_bundle.part_path(part).read_bytes(), layout="NCHW").data
    runtime = TensorRTRuntime(load_library("tensorrt-rtx"), CudaDevice(FakeDriver(), 0))
    with pytest.raises(
        EngineError, match=r"part 'stem': tensorrt-rtx 1\..* cannot load its engine: .*cudaError 35.*doctor"
    ):
        runtime.load(part, data, layout="NCHW")

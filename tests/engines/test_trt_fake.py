"""The path for TensorRT itself, which needs a GPU to build: driven against a stand-in that notes what it is told.

The stand-in is `tests/fake_tensorrt.py`; running its engines is tested in `test_trt_runtime.py`.
"""

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from bdtool.errors import BackendError, EngineError, UsageError
from engines.cuda_device import CudaDevice
from engines.gpu_cache import gpu_cache_path
from engines.layouts import CHANNELS_LAST
from engines.libcuda import Driver, Gpu
from engines.registry import identify_backend
from engines.timing_cache import TimingCache
from engines.trt import TensorRTBackend
from engines.trt_identity import tensorrt_identity
from engines.trt_library import library_from_module
from engines.trt_options import TensorRTOptions
from export.half import half_from_fp32
from tests.fake_driver import FakeDriver
from tests.fake_tensorrt import (
    Builder,
    DType,
    FakeTensorRT,
    IBuilderConfig,
    ICudaEngine,
    IExecutionContext,
    ILogger,
    INetworkDefinition,
    IOptimizationProfile,
    IRuntimeCache,
    IRuntimeConfig,
    ITimingCache,
    OnnxParser,
    Runtime,
)

RUNTIME_NAMES = {
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "CudaGraphStrategy": "DISABLED",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "ProfilingVerbosity": "LAYER_NAMES_ONLY",
}
H200 = Driver((13, 0), (Gpu("NVIDIA H200", (9, 0)),))


def _typed(tensors, dtype):
    return tuple(replace(tensor, dtype=dtype) for tensor in tensors)


@pytest.fixture
def notes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(FakeTensorRT, "notes", {"driver": FakeDriver()})
    return FakeTensorRT.notes


@pytest.fixture
def build(notes, tiny_bundle):
    """Return a function that builds one part of the tiny bundle on the stand-in."""

    def run(name="block_00", options=None, half=False, driver=H200, dtype=None):
        part = tiny_bundle.network.part(name)
        if dtype is not None:
            part = replace(part, inputs=_typed(part.inputs, dtype), outputs=_typed(part.outputs, dtype))
        model = tiny_bundle.part_path(part).read_bytes()
        notes["part"] = name
        library = library_from_module("tensorrt", FakeTensorRT)
        if half:
            part, model = part.with_activation("float16"), half_from_fp32(model, part, "fp16")
        if dtype is not None:  # the stand-in computes in the ONNX's own types: such an engine is only built
            driver = Driver(error="no GPU", gpus=H200.gpus)
        gpu, options_ = driver.gpus[0], options or TensorRTOptions()
        device = CudaDevice(notes["driver"], 0)
        backend = TensorRTBackend(library, options_, driver=driver, gpu=gpu, open_device=lambda: device)
        return backend.build(part, model, layout=CHANNELS_LAST)

    return run


def test_stand_in_has_no_name_that_the_real_classes_lack():
    real = pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra 'rtx'")
    own = {"notes", "flags_set", "shapes", "cache", "entries", "forced_type", "kernels"}
    building = (ITimingCache, IBuilderConfig, IOptimizationProfile, OnnxParser, INetworkDefinition, Builder)
    for fake in (*building, Runtime, ICudaEngine, IExecutionContext, IRuntimeConfig, IRuntimeCache):
        names = {name for name in vars(fake) if not name.startswith("_")} - own
        assert names <= set(dir(getattr(real, fake.__name__))), fake.__name__
    for name in ("TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT"):
        assert hasattr(real.BuilderFlag, name)
    for name, value in FakeTensorRT.TensorFormat.__members__.items():
        assert int(getattr(real.TensorFormat, name)) >= 0, value
    assert set(DType.__members__) <= set(real.DataType.__members__)
    assert hasattr(real.LayerInformationFormat, "JSON")
    assert {"cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"} <= set(vars(real.IRuntimeConfig))
    for names, wanted in RUNTIME_NAMES.items():
        assert wanted in getattr(real, names).__members__


def test_activations_are_plain_where_one_stage_would_need_padding(notes, tiny_bundle, monkeypatch):
    library = library_from_module("tensorrt", FakeTensorRT)
    backend = TensorRTBackend(library, TensorRTOptions(), driver=H200, gpu=H200.gpus[0], open_device=pytest.fail)
    assert backend.activation_layout(tiny_bundle.network) == CHANNELS_LAST
    monkeypatch.setattr("engines.trt.CHANNEL_BLOCK", 32)  # the stages have 16, 32 and 64 channels
    assert backend.activation_layout(tiny_bundle.network) == "NCHW"


def test_network_is_strongly_typed_and_fp32_means_fp32(build, notes):
    built = build()
    assert notes["network_flags"] == 1 << FakeTensorRT.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert notes["config"].flags_set == set()
    assert notes["config"].max_aux_streams == 0
    assert built.details == {"convolutions": {"float": 2}}
    assert 0 <= built.error <= 1e-4  # compared with its ONNX part, as there is a GPU


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (TensorRTOptions(tf32=True), {"TF32"}),
        (TensorRTOptions(version_compatible=True), {"VERSION_COMPATIBLE"}),
        (TensorRTOptions(strip_weights=True, refit=True), {"STRIP_PLAN", "REFIT"}),
    ],
)
def test_options_become_builder_flags(build, notes, options, flags):
    build(options=options)
    assert notes["config"].flags_set == flags


def test_level_and_hardware_compatibility_reach_the_config(build, notes):
    build(options=TensorRTOptions(optimization_level=5, hardware_compatibility="ampere-plus"))
    assert notes["config"].builder_optimization_level == 5
    assert notes["config"].hardware_compatibility_level == "AMPERE_PLUS"


def test_profile_has_three_batches(build, notes):
    build(options=TensorRTOptions(min_batch=2, opt_batch=8, max_batch=32))
    assert notes["config"].shapes == {"x": ((2, 16, 32, 32), (8, 16, 32, 32), (32, 16, 32, 32))}


@pytest.mark.parametrize(
    ("name", "half", "formats"),
    [
        ("block_00", False, ["HWC", "HWC"]),
        ("block_00", True, ["HWC8", "HWC8"]),
        ("stem", True, ["LINEAR", "HWC8"]),
        ("head", True, ["HWC8", "LINEAR"]),
        ("policy", False, ["LINEAR", "LINEAR"]),
    ],
)
def test_only_activations_are_channels_last(build, notes, name, half, formats):
    build(name, half=half)
    assert notes["formats"] == [1 << FakeTensorRT.TensorFormat[name] for name in formats]


@pytest.mark.parametrize(("dtype", "format_name"), [("bfloat16", "HWC8"), ("int8", "HWC16")])
def test_narrow_activations_have_a_channels_last_format(build, notes, dtype, format_name):
    build(dtype=dtype)
    assert notes["formats"] == [1 << FakeTensorRT.TensorFormat[format_name]] * 2


def test_activation_type_without_a_format_is_refused(build):
    with pytest.raises(EngineError, match=r"tensor 'x' is float64; TensorRT engines pass on float32, .*int8"):
        build(dtype="float64")


def test_half_precision_that_was_not_obtained_is_an_error(build, monkeypatch):
    monkeypatch.setattr(INetworkDefinition, "forced_type", DType.FLOAT)
    with pytest.raises(EngineError, match=r"its ONNX states \{'half': 2\} convolutions, .* has \{'float': 2\}"):
        build(half=True)


def test_inspectors_answer_comes_with_the_engine(build):
    assert build().layers == '{"Layers": []}'
    assert build(options=TensorRTOptions(strip_weights=True)).layers is None  # it cannot be loaded before a refit
    assert build(driver=Driver(error="no GPU", gpus=H200.gpus)).layers is None


def test_library_that_gives_nothing_is_quoted(build, notes, monkeypatch):
    def fail(self, network, config):
        self.log.log(ILogger.ERROR, "Error Code 2: out of memory\n  in x.cpp")

    monkeypatch.setattr(Builder, "build_serialized_network", fail)
    with pytest.raises(EngineError, match="part 'block_00': tensorrt builds no engine of it: Error Code 2: out of mem"):
        build()


def test_interrupt_that_comes_in_the_log_ends_the_build(build, monkeypatch):
    """pybind11 prints whatever the log raises, and the library goes on."""
    compile_ = Builder.build_serialized_network

    def log(self, network, config):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return compile_(self, network, config)

    monkeypatch.setattr(Builder, "build_serialized_network", log)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        build()
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Build canceled" in str(caught.value.__context__), "it ends at the next step, not with the engine"


def test_interrupts_are_left_alone_where_they_are_ignored_and_in_threads(build, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: pytest.fail("signals belong to the main thread"))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(build).result().error <= 1e-4
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    assert build().error <= 1e-4


def test_builder_that_does_not_start_is_an_engine_error(build, monkeypatch):
    """TensorRT without a driver: pybind11 has only "factory function returned nullptr" to say, the log says why."""

    def refuse(self, log):
        log.log(ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(Builder, "__init__", refuse)
    with pytest.raises(
        EngineError, match=r"tensorrt 10\.14\.1 does not build it: CUDA initialization failure with error"
    ):
        build()


def test_parts_share_one_timing_cache(build, notes):
    for name in ("stem", "block_00", "block_01"):
        build(name)
    path = gpu_cache_path("timing", gpu="NVIDIA H200", cuda_version="13.0", library="tensorrt10.14.1")
    assert path.name == "NVIDIA-H200-cuda13.0-tensorrt10.14.1.cache"
    assert path.read_bytes() == b"block_00,block_01,stem"


def test_build_that_runs_beside_another_keeps_what_both_learned(tmp_path):
    """Each of many threads starts from an old cache and adds one entry; none may be lost."""
    cache = TimingCache(tmp_path / "a.cache")
    started = threading.Barrier(8)

    def learn(i):
        config = IBuilderConfig()
        with cache.applied(config):
            started.wait()
            config.cache.entries.add(f"kernel{i}")

    threads = [threading.Thread(target=learn, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.path.read_bytes().decode().split(",") == [f"kernel{i}" for i in range(8)]


def test_timing_cache_that_cannot_be_written_costs_only_time(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    config = IBuilderConfig()
    with TimingCache(tmp_path / "file" / "a.cache").applied(config):
        config.cache.entries.add("kernel")
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("refusal", ["set_timing_cache says no", "create_timing_cache gives nothing"])
def test_timing_cache_that_does_not_fit_is_made_anew(build, monkeypatch, caplog, refusal):
    path = gpu_cache_path("timing", gpu="NVIDIA H200", cuda_version="13.0", library="tensorrt10.14.1")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of another GPU")
    create, give = IBuilderConfig.create_timing_cache, IBuilderConfig.set_timing_cache
    if refusal.startswith("set"):
        fits = lambda cache: "of another GPU" not in cache.entries  # noqa: E731
        monkeypatch.setattr(
            IBuilderConfig, "set_timing_cache", lambda self, cache, ignore: fits(cache) and give(self, cache, ignore)
        )
        monkeypatch.setattr(ITimingCache, "combine", lambda self, other, ignore: fits(self))
    else:
        monkeypatch.setattr(
            IBuilderConfig,
            "create_timing_cache",
            lambda self, blob: None if blob == b"of another GPU" else create(self, blob),
        )
    assert build().error <= 1e-4
    assert f"the timing cache {path} is not one for this GPU and version, or is damaged; it is made anew" in caplog.text
    assert path.read_bytes() == b"block_00"


def test_build_whose_cache_cannot_be_read_back_is_built_all_the_same(build, monkeypatch, caplog):
    monkeypatch.setattr(IBuilderConfig, "get_timing_cache", lambda self: None)
    assert build().error <= 1e-4
    assert "cannot be written" in caplog.text


# --- what engines are made for ----------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("engines.trt_identity.installed_version", lambda backend: "10.14.1")


def test_tensorrt_engines_are_named_after_gpu_and_cuda(installed):
    identity, _ = tensorrt_identity("tensorrt", "cuda:0", None, H200)
    assert (identity.version, identity.target, identity.suffix) == ("10.14.1", "sm90-NVIDIA_H200-cuda13.0", ".plan")


def test_builder_times_kernels_on_the_gpu_that_was_asked_for(build, notes):
    build()
    assert [int(context) for context in notes["builder's contexts"]] == [0xC0]  # that of the GPU's stand-in


def test_rtx_engines_default_to_the_gpu_that_is_here(installed):
    _, options = tensorrt_identity("tensorrt-rtx", "cuda:0", None, H200)
    assert options.sms == (90,)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("tensorrt", TensorRTOptions(sms=(89,)), "--sm is for --backend tensorrt-rtx"),
        ("tensorrt-rtx", TensorRTOptions(sms=(89,), hardware_compatibility="ampere-plus"), "hardware compatibility"),
        ("tensorrt-rtx", TensorRTOptions(sms=(89,), version_compatible=True), "no version-compatible engines"),
    ],
)
def test_options_that_a_library_lacks_are_refused(installed, backend, options, message):
    with pytest.raises(UsageError, match=message):
        tensorrt_identity(backend, "cuda:0", options, H200)


def test_device_that_is_not_there_is_refused(installed):
    with pytest.raises(UsageError, match=r"lists 1 GPU\(s\)"):
        tensorrt_identity("tensorrt", "cuda:1", None, H200)
    for options in (None, TensorRTOptions()):
        with pytest.raises(UsageError, match="--device cuda:0"):
            tensorrt_identity("tensorrt", "cpu", options, H200)
    with pytest.raises(BackendError, match=r"no GPU.*bdtool doctor"):
        tensorrt_identity("tensorrt", "cuda:0", None, Driver(error="no GPU"))


@pytest.mark.parametrize(("least", "best", "most"), [(0, 1, 1), (2, 1, 4), (1, 5, 4)])
def test_impossible_profile_is_refused(least, best, most):
    with pytest.raises(UsageError, match="1 <= min <= opt <= max"):
        TensorRTOptions(min_batch=least, opt_batch=best, max_batch=most)


def test_absent_library_shows_its_install_line(monkeypatch):
    monkeypatch.setattr("engines.trt_library.DISTRIBUTIONS", {"tensorrt": ("no-such-distribution",)})
    with pytest.raises(BackendError, match=r'pip install "tensorrt>=10\.13" \(it needs an NVIDIA GPU'):
        identify_backend("tensorrt", "cuda:0")

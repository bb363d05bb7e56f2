"""ONNX Runtime's GPU providers, against a stand-in for its sessions that notes the options and runs on the CPU."""

import functools
import os
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from bdtool import Orchestrator
from bdtool.errors import BackendError, UsageError
from calibration.quantize import quantize_part, watched_tensors
from engines import onnxrt_providers
from engines.libcuda import Driver, Gpu
from engines.onnxrt_providers import (
    CudaProvider,
    TensorRTProvider,
    cuda_install,
    cuda_providers,
    open_session,
    probe_part,
)
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from engines.trt_options import TensorRTOptions
from export.bundle import Bundle
from export.compose import compose_parts
from export.fused import fuse_parts
from export.half import half_from_fp32
from export.onnx_precision import convolves_in_half, precision_of
from export.ort_threads import any_threads_options
from tests.fake_onnxruntime import ALL, install_onnxruntime

TENSORRT, CUDA, CPU = ALL
BACKEND = "onnxruntime-tensorrt"
_NO_DRIVER = Driver(error="no driver")
KEEP = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=bool)


@pytest.fixture
def ort(monkeypatch, tmp_path):
    return install_onnxruntime(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def wider(export_random):
    """A bundle with two blocks of one shape in each stage."""
    return Bundle.open(export_random("resnet14", shortcut="average-pool").bundle)


def _model(bundle, name):
    return bundle.part_path(bundle.network.part(name)).read_bytes()


def _asked(part, model, options=None, *, cache):
    """Return what a session of the part is asked for, the TensorRT provider's options."""
    provider = TensorRTProvider("cuda:0", options or TensorRTOptions(), cache=cache)
    [(name, asked), (second, _)] = provider.listed(part, provider.engine_from_onnx(model))
    assert (name, second) == (TENSORRT, CUDA)
    return asked


@pytest.fixture
def prefix(ort, tmp_path):
    """Return a function from a part and its model to the prefix of its compiled engines."""
    return lambda part, model, options=None: _asked(part, model, options, cache=tmp_path)["trt_engine_cache_prefix"]


def _same_shape(bundle):
    first, second = bundle.network.part("block_00"), bundle.network.part("block_01")
    assert (first.inputs, first.outputs) == (second.inputs, second.outputs)
    return first, second


def test_blocks_of_one_shape_never_share_an_engine(prefix, wider):
    first, second = _same_shape(wider)
    model = _model(wider, first.name)
    assert prefix(first, model) == prefix(first, model)
    assert prefix(first, model) != prefix(second, _model(wider, second.name))


def test_one_weight_that_differs_makes_another_engine(prefix, wider):
    """The graph, which is all that ONNX Runtime itself looks at, is the same."""
    part = wider.network.part("block_00")
    model = onnx.ModelProto.FromString(_model(wider, part.name))
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] = np.nextafter(values[0, 0, 0, 0], np.float32(1))
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    assert prefix(part, _model(wider, part.name)) != prefix(part, model.SerializeToString())


def test_precision_profile_and_level_make_another_engine(prefix, wider):
    part = wider.network.part("block_00")
    model = _model(wider, part.name)
    half = half_from_fp32(model, part, "fp16")
    options = [TensorRTOptions(max_batch=8), TensorRTOptions(opt_batch=8), TensorRTOptions(optimization_level=5)]
    found = [prefix(part, model), prefix(part.with_activation("float16"), half)]
    found += [prefix(part, model, chosen) for chosen in options]
    assert len(set(found)) == 5


def test_profile_names_every_shape(ort, wider, tmp_path):
    options = TensorRTOptions(min_batch=2, opt_batch=8, max_batch=32, optimization_level=4)
    part = wider.network.part("block_00")
    asked = _asked(part, _model(wider, part.name), options, cache=tmp_path)
    assert asked["trt_profile_min_shapes"] == "x:2x16x32x32"
    assert asked["trt_profile_opt_shapes"] == "x:8x16x32x32"
    assert asked["trt_profile_max_shapes"] == "x:32x16x32x32"
    assert asked["trt_builder_optimization_level"] == "4"
    assert asked["trt_engine_cache_path"] == asked["trt_timing_cache_path"] == str(tmp_path)
    assert (asked["trt_engine_cache_enable"], asked["trt_timing_cache_enable"]) == ("True", "True")


@pytest.mark.parametrize(
    ("precision", "flag"), [("fp32", None), ("fp16", "trt_fp16_enable"), ("bf16", "trt_bf16_enable")]
)
def test_part_may_run_in_the_type_it_has_and_no_other(ort, wider, tmp_path, precision, flag):
    part = wider.network.part("block_00")
    model = _model(wider, part.name)
    if precision != "fp32":
        model = half_from_fp32(model, part, precision)
    enabled = [name for name in _asked(part, model, cache=tmp_path) if name.endswith(("16_enable", "8_enable"))]
    assert enabled == ([] if flag is None else [flag])


def test_integer_part_may_run_in_int8(ort, tmp_path):
    part, model = probe_part()
    proto = onnx.ModelProto.FromString(model)
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int8), "zero_point"))
    assert precision_of(proto) == "int8"
    assert _asked(part, proto.SerializeToString(), cache=tmp_path)["trt_int8_enable"] == "True"


@pytest.mark.parametrize("backend", ["onnxruntime", BACKEND])
def test_integer_parts_build_on_a_gpu(ort, wider, backend):
    part = wider.network.part("block_00")
    model = _model(wider, part.name)
    ranges = dict.fromkeys((*watched_tensors(onnx.ModelProto.FromString(model)), part.inputs[0].name), 4.0)
    quantized = quantize_part(model, part, ranges, integer_activations=True)
    built = open_backend(backend, "cuda:0").build(part.with_activation("int8"), quantized, layout="NCHW")
    assert built.error is not None


def test_policy_of_a_half_precision_bundle_stays_fp32(ort, bundle_copy):
    with Orchestrator.open(bundle_copy, backend=BACKEND, device="cuda:0", precision="fp16"):
        assert any("trt_fp16_enable" in asked[TENSORRT] for asked in ort.sessions)
    store = EngineStore(Bundle.open(bundle_copy), identify_backend(BACKEND, "cuda:0"), precision="fp16")
    policy = (store.directory / store.find()["policy"].file).read_bytes()
    provider = TensorRTProvider("cuda:0", TensorRTOptions(), cache=bundle_copy)
    assert "trt_fp16_enable" not in provider.listed(store.network.part("policy"), policy)[0][1]


@pytest.mark.parametrize("form", ["pixels", "preprocessed"])
@pytest.mark.parametrize(
    ("backend", "strategy"),
    [
        (BACKEND, "chain"),
        (BACKEND, "path"),
        ("onnxruntime", "chain"),
        ("onnxruntime", "path"),
        ("onnxruntime", "fused"),
    ],
)
def test_logits_equal_pytorch(ort, tiny, bundle_copy, request, form, preprocessed, torch_logits, backend, strategy):
    images = request.getfixturevalue(form)(tiny.model, len(KEEP))
    with Orchestrator.open(bundle_copy, backend=backend, device="cuda:0", strategy=strategy) as runtime:
        assert runtime.network.takes_pixels
        logits = runtime.run(images, policy=KEEP).logits
    np.testing.assert_allclose(logits, torch_logits(tiny.model, preprocessed(tiny.model, len(KEEP)), KEEP), atol=1e-4)


def test_opening_makes_the_cache_and_switches_tf32_off(ort, bundle_copy, tmp_path):
    Orchestrator.open(bundle_copy, backend=BACKEND, device="cuda:0").close()
    assert (tmp_path / "cache" / "bdtool" / "engines").is_dir()
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"  # the provider has no option for it


def test_engines_run_as_they_were_built(ort, bundle_copy):
    """The profile is in the engine file: opening it later asks for the same compiled engine, not for another one."""
    options = TensorRTOptions(max_batch=8, opt_batch=4)
    store = EngineStore(Bundle.open(bundle_copy), identify_backend(BACKEND, "cuda:0", tensorrt=options))
    statuses = store.build(lambda: open_backend(BACKEND, "cuda:0", tensorrt=options))
    assert {status.status for status in statuses} == {"built"}
    built = set(ort.prefixes())
    ort.sessions.clear()
    with Orchestrator.open(bundle_copy, backend=BACKEND, device="cuda:0"):
        _, *opened = ort.prefixes()  # the first is that of the probe
    assert set(opened) < built
    other = EngineStore(Bundle.open(bundle_copy), identify_backend(BACKEND, "cuda:0", tensorrt=TensorRTOptions()))
    assert other.find() == {}  # another profile is another engine


def test_cuda_provider_computes_without_tf32(ort, bundle_copy):
    with Orchestrator.open(bundle_copy, backend="onnxruntime", device="cuda:0"):
        assert ort.sessions
        assert all(asked == {CUDA: {"device_id": "0", "use_tf32": "0"}} for asked in ort.sessions)
    assert ort.loads == 1  # of the CUDA libraries that pip installed, as `bdtool doctor` does


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", {"use_tf32": "0"}), ("fp16", {})])
def test_only_convolutions_of_float32_are_kept_from_tf32(wider, precision, tf32):
    """Without TF32 the CUDA provider takes no tensor core at all, and half precision is for those."""
    parts = [wider.network.part(name) for name in ("stem", "block_00", "head")]
    models = [_model(wider, part.name) for part in parts]
    if precision == "fp16":
        models = [half_from_fp32(model, part, "fp16") for model, part in zip(models, parts, strict=True)]
    path = compose_parts("path", list(zip(parts, models, strict=True)))
    for model in (models[1], path):  # the classifier, a matrix product, stays float32
        assert CudaProvider("cuda:0").listed(parts[1], model) == [(CUDA, {"device_id": "0"} | tf32)]


def test_convolutions_within_branches_count(wider):
    half = {part.name: half_from_fp32(_model(wider, part.name), part, "fp16") for part in wider.network.parts}
    model = onnx.ModelProto.FromString(fuse_parts(wider.network, half, check=False))
    outside = [node for node in model.graph.node if node.op_type == "Conv"]
    assert not convolves_in_half(model)  # the policy network, which stays float32, is in it
    for node in outside:
        model.graph.node.remove(node)
    assert convolves_in_half(model)  # the blocks
    branches = [attribute.g for node in model.graph.node for attribute in node.attribute if attribute.HasField("g")]
    [weight, *_] = [tensor for branch in branches for tensor in branch.initializer if len(tensor.dims) == 4]
    weight.data_type = TensorProto.FLOAT
    assert not convolves_in_half(model)


def test_only_the_cuda_provider_plans_by_batch(ort):
    assert open_backend("onnxruntime", "cuda:0").plans_by_batch
    assert not open_backend(BACKEND, "cuda:0").plans_by_batch
    assert not open_backend("onnxruntime", "cpu").plans_by_batch


@pytest.mark.parametrize(
    ("backend", "missing", "message"),
    [
        (
            BACKEND,
            TENSORRT,
            r"no TensorRT provider \(it has CUDAEx.*\); install it with: pip uninstall onnxruntime; pip",
        ),
        ("onnxruntime", CUDA, r"no CUDA provider \(it has TensorrtEx.*pip install onnxruntime-gpu"),
    ],
)
def test_provider_that_is_not_installed_shows_what_installs_it(monkeypatch, tmp_path, backend, missing, message):
    install_onnxruntime(monkeypatch, tmp_path, available=[name for name in ALL if name != missing])
    with pytest.raises(BackendError, match=f"device 'cuda:0': this onnxruntime has {message}"):
        open_backend(backend, "cuda:0")


def test_provider_that_does_not_load_shows_what_it_needs(monkeypatch, tmp_path):
    """Without TensorRT's libraries ONNX Runtime goes on with the next provider, and only its log says so."""
    install_onnxruntime(monkeypatch, tmp_path, loadable=(CUDA, CPU))
    with pytest.raises(
        BackendError, match=r'asked for TensorrtEx.* fell back to CUDAEx.*pip install "tensorrt>=10\.13'
    ):
        open_backend(BACKEND, "cuda:0")


def test_cuda_provider_that_does_not_load_shows_what_brings_its_libraries(monkeypatch, tmp_path):
    """As on a machine with a driver alone: libcurand comes with neither ONNX Runtime nor PyTorch."""
    install_onnxruntime(monkeypatch, tmp_path, loadable=(CPU,))
    with pytest.raises(BackendError, match=r"fell back to CPUEx.*pip install \"onnxruntime-gpu\[cuda,cudnn\]>=1"):
        open_backend("onnxruntime", "cuda:0")


@pytest.mark.parametrize(("cuda", "below"), [((12, 4), ",<1.27"), ((13, 0), "")])
def test_driver_of_cuda_12_is_given_packages_of_cuda_12(cuda, below):
    driver = Driver(cuda, (Gpu("Tesla T4", (7, 5)),))
    assert cuda_install(driver) == f'pip install "onnxruntime-gpu[cuda,cudnn]>=1.25{below}"'


def test_session_on_a_gpu_is_not_greeted_with_a_warning(capfd):
    """By the library that is installed: it warns before it looks for the provider's own libraries."""
    if CUDA not in onnxrt_providers.ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    open_session(probe_part()[1], any_threads_options(), cuda_providers("cuda:0"))
    assert "No registered plugin EP device found" not in capfd.readouterr().err


def test_session_that_lost_its_provider_is_refused(ort, tiny_bundle):
    backend = open_backend(BACKEND, "cuda:0")
    part = tiny_bundle.network.part("head")
    engine = TensorRTProvider("cuda:0", TensorRTOptions(), cache=tiny_bundle.path).engine_from_onnx(
        tiny_bundle.part_path(part).read_bytes()
    )
    ort.loadable = (CUDA, CPU)
    with pytest.raises(BackendError, match=r"part 'head': asked for TensorrtEx.*, ONNX Runtime chose \['CUDAEx"):
        backend.load(part, engine, layout="NCHW")


def test_cache_is_bounded_and_what_was_used_last_stays(ort, monkeypatch, bundle_copy, tmp_path):
    open_one = functools.partial(Orchestrator.open, bundle_copy, backend=BACKEND, device="cuda:0")
    open_one().close()
    [directory] = (tmp_path / "cache" / "bdtool" / "engines").iterdir()
    part, model = probe_part()
    used = TensorRTProvider("cuda:0", TensorRTOptions(), cache=directory)
    digest = used.listed(part, used.engine_from_onnx(model))[0][1]["trt_engine_cache_prefix"]
    other = directory.parent / "other GPU"
    other.mkdir()
    names = [other / "oldest", directory / f"{digest}_1.engine", directory / "newer.engine", directory / "newest.cache"]
    for age, path in zip((4, 3, 2, 1), names, strict=True):
        path.write_bytes(bytes(100))
        os.utime(path, times=(time.time() - 1000 * age,) * 2)
    monkeypatch.setattr(onnxrt_providers, "MAX_CACHE_BYTES", 300)
    used.listed(part, used.engine_from_onnx(model))
    with open_one():
        assert [path.exists() for path in names] == [False, True, True, True]
    monkeypatch.setattr(onnxrt_providers, "MAX_CACHE_BYTES", 150)
    with open_one():
        assert [path.exists() for path in names] == [False, True, False, False]


def test_cache_that_cannot_be_made_costs_only_time(ort, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    part, model = probe_part()
    asked = _asked(part, model, cache=tmp_path / "file" / "engines")
    assert not [name for name in asked if "cache" in name]
    assert "TensorRT compiles its engines again" in caplog.text


def test_it_runs_on_a_gpu_only_and_says_so(monkeypatch):
    with pytest.raises(UsageError, match=f"backend '{BACKEND}' runs its engines on a GPU: give --device cuda:0"):
        identify_backend(BACKEND, "cpu")
    monkeypatch.setattr("engines.onnxrt_providers.driver_from_libcuda", lambda: _NO_DRIVER)
    with pytest.raises(BackendError, match=f"backend '{BACKEND}', device 'cuda:0': no driver.*bdtool doctor"):
        open_backend(BACKEND, "cuda:0")


def test_gpu_that_is_not_there_is_refused(ort):
    with pytest.raises(BackendError, match=r"device 'cuda:1': the driver lists 1 GPU\(s\)"):
        open_backend(BACKEND, "cuda:1")


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"sms": (89,)}, "--sm"),
        ({"tf32": True}, "--tf32"),
        ({"version_compatible": True}, "--version-compatible"),
        ({"hardware_compatibility": "ampere-plus"}, "--hardware-compatibility-level"),
    ],
)
def test_options_that_the_provider_lacks_are_refused(options, flag):
    message = rf"{flag}: ONNX Runtime's TensorRT provider has no such option; it takes --min-batch, .*-level\. Use"
    with pytest.raises(UsageError, match=message):
        identify_backend(BACKEND, "cuda:0", tensorrt=TensorRTOptions(**options))


def test_strategies_that_it_lacks_are_refused(ort, bundle_copy):
    with pytest.raises(UsageError, match=f"'{BACKEND}' has no strategy 'fused', only chain, path, full; or use"):
        Orchestrator.open(bundle_copy, backend=BACKEND, device="cuda:0", strategy="fused")


def test_a_provider_that_is_only_described_leaves_tf32_to_others(tmp_path, monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    TensorRTProvider("cuda:0", TensorRTOptions(), cache=tmp_path)
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ


def test_both_providers_name_the_same_gpu(tmp_path):
    part, model = probe_part()
    provider = TensorRTProvider("cuda:3", TensorRTOptions(), cache=tmp_path)
    ids = [options["device_id"] for _, options in provider.listed(part, provider.engine_from_onnx(model))]
    assert ids == ["3", "3"]
    assert CudaProvider("cuda:3").listed(part, model)[0][1]["device_id"] == "3"

"""TensorRT-RTX engines, really built: every part, FP32 and FP16, channels-last, on a machine without a GPU."""

import ctypes
import gc
import json
import signal
import weakref
from dataclasses import replace

import onnx
import pytest
from onnx import helper

from bdtool.errors import BackendError, BundleError, EngineError, UsageError
from bdtool.models.parts import network_spec, part_modules
from bdtool.specs import Preprocessing
from calibration.quantize import quantize_part, watched_tensors
from engines.layouts import CHANNELS_LAST
from engines.libcuda import Driver
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from engines.trt_interrupts import cancelling
from engines.trt_library import load_library
from engines.trt_options import TensorRTOptions
from engines.trt_plan import plan_from_bytes
from export.bundle import Bundle
from export.compose import compose_parts
from export.half import half_from_fp32
from export.half_spec import HALF_DTYPES
from export.onnx_model import OnnxExporter, fold_batch_norm
from export.pixels import pixels_from_preprocessed

pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra 'rtx'")
RTX = "tensorrt-rtx"
OPTIONS = TensorRTOptions(sms=(86, 89, 120))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return a function that builds every engine of a bundle with TensorRT-RTX: (store, records by part)."""

    def run(bundle, precision, options=OPTIONS):
        identity = identify_backend(RTX, "cpu", tensorrt=options)
        store = EngineStore(bundle, identity, precision=precision, directory=tmp_path_factory.mktemp("engines"))
        statuses = store.build(lambda: open_backend(RTX, "cpu", tensorrt=options))
        assert [status.message for status in statuses if status.status == "failed"] == []
        return store, {status.name: status.record for status in statuses}

    return run


@pytest.fixture(scope="module", params=["resnet32", "resnet101"])
def parts(request, random_model, shared_traces):
    """Every part of a network that the paper deploys, as (spec, ONNX model), at its real image size."""
    model = random_model(request.param)
    network, modules, exporter = network_spec(model), part_modules(model), OnnxExporter()
    found = [(p, exporter.onnx_from_module(fold_batch_norm(modules[p.name]), p)) for p in network.parts]
    chain = [(part, data) for part, data in found if part.kind in ("stem", "block", "head")]
    return [*found, (network.whole("full", flops=0), compose_parts("full", chain, check=False))]


KERNEL_TYPE = {"fp32": "float", "fp16": "half"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_part_builds_in_its_precision_with_channels_last_activations(parts, precision):
    backend = open_backend(RTX, "cpu", tensorrt=TensorRTOptions(sms=(86, 89, 120), max_batch=1))
    for part, model in parts:
        if precision in HALF_DTYPES:
            part, model = part.with_activation(HALF_DTYPES[precision]), half_from_fp32(model, part, precision)
        details = backend.build(part, model, layout=CHANNELS_LAST).details
        assert details["architectures"] == ["sm86", "sm89", "sm120"]
        assert (details["tf32"], details["capturable"]) == (False, True), part.name
        wanted = "float" if part.kind == "policy" else KERNEL_TYPE[precision]
        assert set(details["convolutions"]) <= {wanted}, part.name
        if part.kind in ("block", "shortcut"):
            n_convolutions = sum(details["convolutions"].values())
            assert n_convolutions >= (2 if part.kind == "block" else 1)
            assert set(details["kernel_types"]) == {wanted}
            assert len(details["kernels"]) == n_convolutions, part.name  # the add and the ReLUs are fused in


@pytest.mark.slow
def test_every_int8_part_builds_with_integer_activations(parts):
    backend = open_backend(RTX, "cpu", tensorrt=TensorRTOptions(sms=(86, 89, 120), max_batch=1))
    for part, model in parts:
        if part.kind in ("policy", "full"):
            continue  # fp32, and built of the other parts
        ranges = dict.fromkeys((*watched_tensors(onnx.ModelProto.FromString(model)), part.inputs[0].name), 4.0)
        quantized = quantize_part(model, part, ranges, integer_activations=True, weights=part.kind != "head")
        details = backend.build(part.with_activation("int8"), quantized, layout=CHANNELS_LAST).details
        assert details["architectures"] == ["sm86", "sm89", "sm120"]
        assert "int8" in details["kernel_types"] or part.kind in ("head", "shortcut"), part.name
        assert set(details["convolutions"]) <= {"int8"}, part.name
        assert part.kind != "block" or details["convolutions"]["int8"] >= 2, part.name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_normalising_pixels_costs_no_kernel(parts, precision):
    """The first kernel, which only changes the layout of preprocessed images, normalises pixels on the way."""
    backend = open_backend(RTX, "cpu", tensorrt=TensorRTOptions(sms=(86, 89, 120), max_batch=1))
    reading = [(part, model) for part, model in parts if part.reads_image]
    assert [part.kind for part, _ in reading] == ["policy", "stem", "full"]
    for part, model in reading:
        _, _, height, width = part.inputs[0].shape
        size = Preprocessing(height=height, width=width, mean=(0.5, 0.4, 0.45), std=(0.2, 0.25, 0.22))
        if precision in HALF_DTYPES:
            part, model = part.with_activation(HALF_DTYPES[precision]), half_from_fp32(model, part, precision)
        of_pixels = pixels_from_preprocessed(model, part, size)
        before = backend.build(part, model, layout=CHANNELS_LAST).details
        after = backend.build(part.with_pixels(), of_pixels, layout=CHANNELS_LAST).details
        assert len(after["kernels"]) == len(before["kernels"]), part.name
        assert "Cast" in after["kernels"][0]
        assert (after["convolutions"], after["capturable"]) == (before["convolutions"], True), part.name


def test_integer_and_bfloat16_stems_take_pixels(tiny_bundle):
    stem, size = tiny_bundle.network.part("stem"), tiny_bundle.network.preprocessing
    model = tiny_bundle.part_path(stem).read_bytes()
    ranges = dict.fromkeys((*watched_tensors(onnx.ModelProto.FromString(model)), "image"), 4.0)
    backend = open_backend(RTX, "cpu", tensorrt=OPTIONS)
    forms = {
        "int8": quantize_part(model, stem, ranges, integer_activations=True),
        "bfloat16": half_from_fp32(model, stem, "bf16"),
    }
    for dtype, lower in forms.items():
        part = stem.with_activation(dtype).with_pixels()
        built = backend.build(part, pixels_from_preprocessed(lower, stem, size), layout=CHANNELS_LAST)
        assert built.details["convolutions"] == {"bf16" if dtype == "bfloat16" else "int8": 1}


def test_bf16_parts_build_in_bfloat16(tiny_bundle):
    backend = open_backend(RTX, "cpu", tensorrt=OPTIONS)
    for name in ("stem", "block_00", "block_01", "shortcut_01", "head"):
        part = tiny_bundle.network.part(name)
        model = half_from_fp32(tiny_bundle.part_path(part).read_bytes(), part, "bf16")
        details = backend.build(part.with_activation("bfloat16"), model, layout=CHANNELS_LAST).details
        assert set(details["convolutions"]) == (set() if name == "head" else {"bf16"}), name


def test_plain_activations_cost_two_more_kernels(tiny_bundle):
    """What channels-last is for; should this fail, TensorRT-RTX has learned to do without it."""
    part = tiny_bundle.network.part("block_00")
    backend = open_backend(RTX, "cpu", tensorrt=OPTIONS)
    model = tiny_bundle.part_path(part).read_bytes()
    n_kernels = {
        layout: len(backend.build(part, model, layout=layout).details["kernels"]) for layout in ("NCHW", CHANNELS_LAST)
    }
    assert n_kernels == {"NCHW": 4, CHANNELS_LAST: 2}


def test_tiny_network_prefers_channels_last(tiny_bundle):
    assert open_backend(RTX, "cpu", tensorrt=OPTIONS).activation_layout(tiny_bundle.network) == CHANNELS_LAST


@pytest.mark.parametrize("max_batch", [1, 64])
def test_every_part_of_a_tiny_network_can_be_captured(tiny_bundle, build, max_batch):
    _, records = build(tiny_bundle, "fp16", TensorRTOptions(sms=(89,), max_batch=max_batch))
    assert {record.details["capturable"] for record in records.values()} == {True}


def test_tf32_is_used_only_when_asked_for(tiny_bundle, build):
    _, records = build(tiny_bundle, "fp32", TensorRTOptions(sms=(89,), tf32=True))
    assert records["block_00"].details["tf32"] is True


def test_other_settings_are_built_again_and_the_same_are_found(tiny_bundle, tmp_path):
    def names_built(options):
        store = EngineStore(tiny_bundle, identify_backend(RTX, "cpu", tensorrt=options), directory=tmp_path)
        statuses = store.build(lambda: open_backend(RTX, "cpu", tensorrt=options))
        return {status.name for status in statuses if status.status == "built"}

    everything = {part.name for part in tiny_bundle.network.parts}
    assert names_built(TensorRTOptions(sms=(89,))) == everything
    assert names_built(TensorRTOptions(sms=(89,))) == set()
    assert names_built(TensorRTOptions(sms=(89,), optimization_level=0)) == everything
    assert names_built(TensorRTOptions(sms=(89, 120))) == everything  # in a directory of its own


def test_engines_of_any_settings_fit_whoever_names_none(tiny_bundle, build):
    store, _ = build(tiny_bundle, "fp32", TensorRTOptions(sms=(89,), optimization_level=1))
    anyone = EngineStore(tiny_bundle, replace(store.identity, settings=None), directory=store.directory.parent)
    assert set(anyone.find()) == {part.name for part in tiny_bundle.network.parts}


def test_failed_part_is_quoted_with_its_node_and_loses_no_other(bundle_copy):
    _rename_operator(bundle_copy, "block_01", "Frobnicate")
    bundle = Bundle.open(bundle_copy)
    store = EngineStore(bundle, identify_backend(RTX, "cpu", tensorrt=OPTIONS))
    statuses = store.build(lambda: open_backend(RTX, "cpu", tensorrt=OPTIONS))
    [failed] = [status for status in statuses if status.status == "failed"]
    assert failed.name == "block_01"
    assert "part 'block_01': tensorrt-rtx's ONNX parser refuses it: node 'node_relu_0'" in failed.message
    assert "(Frobnicate)" in failed.message
    assert sum(status.status == "built" for status in statuses) == len(bundle.network.parts) - 1


def _rename_operator(path, name, operator):
    """Edit one part, and the manifest so that its digest fits: a model with an operator of one's own."""
    from export.files import sha256_of_file

    file = path / "onnx" / f"{name}.onnx"
    model = onnx.load(file)
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = operator, "example"
    model.opset_import.append(helper.make_opsetid("example", 1))
    onnx.save(model, file)
    manifest = json.loads((path / "manifest.json").read_text())
    next(part for part in manifest["parts"] if part["name"] == name)["sha256"] = sha256_of_file(file)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_garbage_is_refused_in_the_parsers_words(tiny_bundle):
    backend = open_backend(RTX, "cpu", tensorrt=OPTIONS)
    with pytest.raises(EngineError, match=r"part 'head': .*Failed to parse the ONNX model"):
        backend.build(tiny_bundle.network.part("head"), b"garbage", layout=CHANNELS_LAST)


def test_interrupt_cancels_the_build(tiny_bundle, monkeypatch):
    def pressed(trt, interrupts):
        monitor = cancelling(trt, interrupts)

        class Pressed(type(monitor)):
            def step_complete(self, phase, step):
                signal.raise_signal(signal.SIGINT)
                return super().step_complete(phase, step)

        return Pressed()

    monkeypatch.setattr("engines.trt_build.cancelling", pressed)
    backend, full = open_backend(RTX, "cpu", tensorrt=OPTIONS), tiny_bundle.network.require("full")
    with pytest.raises(KeyboardInterrupt) as caught:
        backend.build(full, (tiny_bundle.path / "onnx" / "full.onnx").read_bytes(), layout=CHANNELS_LAST)
    assert "BuildCanceled" in str(caught.value.__context__)


@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_engines_whose_weights_change_need_a_gpu(monkeypatch, option):
    """TensorRT-RTX 1.7 compiles them with the driver; without one each part would fail in words of its own."""
    monkeypatch.setattr("engines.trt.driver_from_libcuda", lambda: Driver(installed=False, error="no driver"))
    flag = option.replace("_", "-")
    with pytest.raises(BackendError, match=rf"--{flag}: TensorRT-RTX needs a GPU for it, .* none \(no driver\)"):
        open_backend(RTX, "cpu", tensorrt=TensorRTOptions(sms=(89,), **{option: True}))


def test_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"builds for the compute capabilities 75, .*120.*, not for 90"):
        open_backend(RTX, "cpu", tensorrt=TensorRTOptions(sms=(89, 90)))


def test_target_must_be_said_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: Driver(installed=False, error="no driver"))
    with pytest.raises(UsageError, match="--sm 86,89,120"):
        identify_backend(RTX, "cpu", tensorrt=TensorRTOptions())
    with pytest.raises(BackendError, match=r"no driver.*--sm 89 builds without a GPU"):
        identify_backend(RTX, "cuda:0")


def test_order_of_targets_does_not_matter():
    names = {identify_backend(RTX, "cpu", tensorrt=TensorRTOptions(sms=sms)).target for sms in [(89, 86), (86, 89, 86)]}
    assert names == {"sm86-sm89"}


def test_int8_is_not_made_from_fp32(tiny_bundle):
    with pytest.raises(BundleError, match="has no int8 parts"):
        EngineStore(tiny_bundle, identify_backend(RTX, "cpu", tensorrt=OPTIONS), precision="int8")


def test_engines_that_were_only_built_say_what_runs_them(tiny_bundle, build):
    store, records = build(tiny_bundle, "fp32")
    with pytest.raises(BackendError, match="runs its engines on a GPU: give --device cuda:0"):
        store.load(open_backend(RTX, "cpu", tensorrt=OPTIONS), records)


def test_bytes_that_are_no_plan_give_no_answer():
    assert plan_from_bytes(b"") is None
    assert plan_from_bytes(b"header {\n  version = 5\n}\n") is None


def test_dynamic_batch_has_a_place_on_the_host(tiny_bundle):
    part = tiny_bundle.network.part("block_00")
    backend = open_backend(RTX, "cpu", tensorrt=OPTIONS)
    data = backend.build(part, tiny_bundle.part_path(part).read_bytes(), layout="NCHW").data
    assert b"name=system_hmem_topdown_0 size=8 " in data  # without it the first run writes the batch to a null pointer


def _program(*, kernel, region, capturable):
    header = f"  region = {{ name=memory type={region} place=accelerator }}\n  stream_capturable={capturable}"
    step = f'  function={{ name={kernel} output_args={{ "y" }} }}'
    return f'header {{\n{header}\n}}\ndescriptors {{\n  tensor={{ name="y" type=float }}\n}}\n\nmain {{\n{step}\n}}\n'


def test_programs_that_refit_weights_are_no_part_of_a_run():
    run = _program(kernel="convolution", region="user", capturable=1)
    plan = plan_from_bytes((run + 2 * _program(kernel="move", region="system", capturable=0)).encode())
    assert ([kernel.name for kernel in plan.kernels], plan.capturable) == (["convolution"], True)


def test_plan_says_what_its_convolutions_multiply():
    tensors = "".join(
        f'  tensor={{ name="{name}" type={dtype} }}\n' for name, dtype in [("x", "int8"), ("w", "int8"), ("c", "float")]
    )
    steps = (
        '  corrltn={ name="conv1" output={"c" } input={"x" "w" } }\n'
        '  function={ name=__myl_Relu input_args={ "c" } output_args={ "c" } }\n'
        '  corrltn={ name="conv2" output={"c" } input={"c" "w" } }'
    )
    header = "  stream_capturable=1"
    text = f"header {{\n{header}\n}}\ndescriptors {{\n{tensors}}}\n\nmain {{\n{steps}\n}}\n"
    assert plan_from_bytes(text.encode()).convolutions == {"int8": 1, "float": 1}


def test_program_that_ends_on_the_host_is_not_capturable():
    run = _program(kernel="convolution", region="user", capturable=1)
    assert not plan_from_bytes((run + _program(kernel="copy", region="user", capturable=0)).encode()).capturable


def test_log_that_the_library_holds_on_to_outlives_its_backend():
    first, second = load_library(RTX), load_library(RTX)
    builders = [library.module.Builder(library.log) for library in (first, second)]
    get_logger = ctypes.CDLL("libtensorrt_rtx.so.1").getLogger
    get_logger.restype = ctypes.c_void_p
    log, registered = weakref.ref(first.log), get_logger()
    del first, builders[0]
    gc.collect()
    assert get_logger() == registered  # the first one, though its builder is gone
    assert log() is not None

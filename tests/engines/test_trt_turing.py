"""Parts as TensorRT-RTX builds them for Turing: equal in value, computed by ONNX Runtime, and really built."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bdtool.errors import EngineError
from calibration.quantize import quantize_part, watched_tensors
from engines.layouts import CHANNELS_LAST
from engines.registry import open_backend
from engines.trt_options import TensorRTOptions
from engines.trt_plan import Kernel, Plan
from engines.trt_turing import products_as_convolutions
from export.half import half_from_fp32


def _linear(*, transposed, weights=True, **attributes):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 7) if transposed else (7, 5)).astype(np.float32)
    constants = [numpy_helper.from_array(kernel, "w"), numpy_helper.from_array(kernel.ravel()[:5].copy(), "b")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 7])]
    if not weights:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, list(kernel.shape)))
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=int(transposed), **attributes)
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])]
    graph = helper.make_graph([node], "part", inputs, outputs, constants if weights else constants[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _operators(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("n_images", [1, 3])
def test_matrix_product_is_a_convolution_of_one_pixel(transposed, n_images):
    model = _linear(transposed=transposed)
    rewritten = onnx.ModelProto.FromString(products_as_convolutions(model.SerializeToString()))
    onnx.checker.check_model(rewritten, full_check=True)
    assert _operators(rewritten) == ["Reshape", "Conv", "Reshape"]
    images = np.random.default_rng(1).normal(size=(n_images, 7)).astype(np.float32)
    [expected], [found] = (ReferenceEvaluator(one).run(None, {"x": images}) for one in (model, rewritten))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", [{"weights": False}, {"alpha": 0.5}, {"beta": 2.0}])
def test_other_products_stay(other):
    model = _linear(transposed=True, **other)
    assert _operators(onnx.ModelProto.FromString(products_as_convolutions(model.SerializeToString()))) == ["Gemm"]


def test_parts_answer_as_before(cpu, tiny_bundle):
    """Policy network, head and the whole network: each ends with a matrix product."""
    for name in ("policy", "head", "full"):
        part = tiny_bundle.network.part(name)
        model = tiny_bundle.part_path(part).read_bytes()
        rewritten = products_as_convolutions(model)
        assert rewritten != model
        source, shape = part.inputs[0].name, part.inputs[0].shape_for(2)
        feeds = {source: np.random.default_rng(2).normal(size=shape).astype(np.float32)}
        expected, found = (cpu.load(part, one, layout="NCHW").run(feeds) for one in (model, rewritten))
        for output in part.outputs:
            np.testing.assert_allclose(found[output.name], expected[output.name], atol=1e-5)


@pytest.mark.parametrize("sms", [(75,), (75, 86, 120)])
@pytest.mark.parametrize("max_batch", [1, 8])
def test_every_part_builds_for_turing(tiny_bundle, sms, max_batch):
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra 'rtx'")
    backend = open_backend("tensorrt-rtx", "cpu", tensorrt=TensorRTOptions(sms=sms, max_batch=max_batch))
    for part in tiny_bundle.network.parts:
        model = tiny_bundle.part_path(part).read_bytes()
        details = backend.build(part, model, layout="NCHW").details
        assert details["architectures"] == [f"sm{sm}" for sm in sms], part.name
        assert details["capturable"], part.name


def _build(bundle, precision, sms):
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra 'rtx'")
    part = bundle.network.part("block_00")
    model = bundle.part_path(part).read_bytes()
    if precision == "fp16":
        part, model = part.with_activation("float16"), half_from_fp32(model, part, precision)
    if precision == "int8":
        ranges = dict.fromkeys((*watched_tensors(onnx.ModelProto.FromString(model)), "x"), 4.0)
        part, model = part.with_activation("int8"), quantize_part(model, part, ranges, integer_activations=True)
    backend = open_backend("tensorrt-rtx", "cpu", tensorrt=TensorRTOptions(sms=sms, max_batch=1))
    return backend.build(part, model, layout=CHANNELS_LAST).details


@pytest.mark.parametrize(
    ("sms", "advice"),
    [
        ((75,), "for sm75 .* build with --precision fp16"),
        ((75, 86, 89), "for sm75, sm86, sm89 .* build with --sm 86,89, and for 75 apart, with --precision fp16"),
    ],
)
def test_int8_for_turing_is_refused_as_it_would_be_computed_in_float(tiny_bundle, sms, advice):
    """Should this fail, TensorRT-RTX has learned INT8 on Turing."""
    with pytest.raises(EngineError, match=rf"'block_00': its ONNX states {{'int8': 2}} convolutions; {advice}"):
        _build(tiny_bundle, "int8", sms)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_float_blocks_are_computed_for_turing_as_stated(tiny_bundle, precision):
    assert sum(_build(tiny_bundle, precision, (75, 86))["convolutions"].values()) == 2


def _plan_multiplying(*types):
    kernels = tuple(Kernel(f"kernel_{i}", "float", multiplies) for i, multiplies in enumerate(types))
    return lambda data: Plan(kernels, ("sm89",), tf32=False, capturable=True)


def test_other_types_on_other_gpus_are_reported(tiny_bundle, monkeypatch):
    monkeypatch.setattr("engines.trt_build.plan_from_bytes", _plan_multiplying("float", "int8", None))
    with pytest.raises(EngineError, match=r"{'int8': 1} .*sm89.* {'float': 1} instead, .*another --precision"):
        _build(tiny_bundle, "int8", (89,))


@pytest.mark.parametrize("types", [("int8", None), (), ("int8", "int8", "float")])
def test_convolution_that_became_another_kernel_is_no_reason(tiny_bundle, monkeypatch, types):
    monkeypatch.setattr("engines.trt_build.plan_from_bytes", _plan_multiplying(*types))
    assert _build(tiny_bundle, "int8", (89,))["convolutions"] == {"int8": 2}

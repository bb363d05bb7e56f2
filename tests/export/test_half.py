"""FP16 and BF16 parts hold the weights that PyTorch's own casts give, and keep in FP32 what decides."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bdtool.errors import ExportError
from bdtool.models.parts import part_modules
from bdtool.specs import PartSpec, TensorSpec
from export.bundle import Bundle
from export.check import OnnxReference
from export.half import half_from_fp32
from export.half_spec import HALF_DTYPES
from export.onnx_model import fold_batch_norm
from export.onnx_precision import float32_form, numpy_type

FLOAT = TensorProto.FLOAT
HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# fp16 keeps 11 bits: each of a few thousand products and each stored activation is rounded by up to 2^-11 = 5e-4;
# bf16 keeps 8, so eight times that
TOLERANCES = {"fp16": 5e-3, "bf16": 4e-2}
PRECISIONS = pytest.mark.parametrize("precision", ["fp16", "bf16"])


@pytest.fixture(scope="module")
def bundle(tiny):
    return Bundle.open(tiny.bundle)


def _convert(bundle, name, precision="fp16"):
    part = bundle.network.part(name)
    return part, onnx.ModelProto.FromString(half_from_fp32(bundle.part_path(part).read_bytes(), part, precision))


def _runnable(model, precision):
    """Return the bytes of a model that ONNX Runtime's CPU provider has kernels for."""
    return (float32_form(model) if precision == "bf16" else model).SerializeToString()


def _types(infos):
    return [info.type.tensor_type.elem_type for info in infos]


@PRECISIONS
@pytest.mark.parametrize(
    ("name", "half_input", "half_output"),
    [
        ("stem", False, True),
        ("block_00", True, True),
        ("shortcut_01", True, True),
        ("head", True, False),
        ("full", False, False),
        ("policy", False, False),
    ],
)
def test_only_activations_between_parts_are_half(bundle, name, half_input, half_output, precision):
    part, model = _convert(bundle, name, precision)
    onnx_type, dtype = {True: HALF[precision], False: FLOAT}, {True: HALF_DTYPES[precision], False: "float32"}
    assert _types(model.graph.input) == [onnx_type[half_input]]
    assert _types(model.graph.output) == [onnx_type[half_output]]
    typed = bundle.network.with_activation(HALF_DTYPES[precision]).part(name)
    assert (typed.inputs[0].dtype, typed.outputs[0].dtype) == (dtype[half_input], dtype[half_output])
    assert typed.inputs[0].shape == part.inputs[0].shape


@PRECISIONS
def test_weights_are_those_of_a_cast_module(bundle, tiny, precision):
    for name in ("stem", "block_00", "block_02"):
        _, model = _convert(bundle, name, precision)
        weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer if w.data_type == HALF[precision]}
        expected = fold_batch_norm(part_modules(tiny.model)[name]).to(getattr(torch, HALF_DTYPES[precision]))
        assert set(weights) == set(expected.state_dict())
        for key, tensor in expected.state_dict().items():
            found = weights[key].astype(np.float32)
            np.testing.assert_array_equal(found, tensor.float().numpy(), err_msg=f"{name} {key}")


@PRECISIONS
def test_policy_and_classifier_keep_their_fp32_weights(bundle, precision):
    part = bundle.network.part("policy")
    original = bundle.part_path(part).read_bytes()
    assert half_from_fp32(original, part, precision) == original
    for name in ("head", "full"):
        _, model = _convert(bundle, name, precision)
        [gemm] = [node for node in model.graph.node if node.op_type == "Gemm"]
        types = {weight.name: weight.data_type for weight in model.graph.initializer}
        assert {types[weight] for weight in gemm.input[1:]} == {FLOAT}


def test_head_pools_and_classifies_in_fp32_without_a_way_back(bundle):
    _, model = _convert(bundle, "head")
    assert [node.op_type for node in model.graph.node].count("Cast") == 1


@PRECISIONS
@pytest.mark.parametrize("name", ["stem", "block_00", "block_01", "shortcut_01", "head", "full"])
def test_half_parts_compute_what_the_fp32_parts_compute(bundle, name, precision):
    part, model = _convert(bundle, name, precision)
    typed = part.with_activation(HALF_DTYPES[precision])
    x = np.random.default_rng(0).normal(size=part.inputs[0].shape_for(2)).astype(np.float32)
    half_x = x.astype(numpy_type(typed.inputs[0].dtype))
    half_x = half_x.astype(np.float32) if precision == "bf16" else half_x  # see `_runnable`
    [expected] = OnnxReference(bundle.part_path(part).read_bytes()).run({part.inputs[0].name: x}).values()
    [actual] = OnnxReference(_runnable(model, precision)).run({part.inputs[0].name: half_x}).values()
    error = np.abs(actual.astype(np.float32) - expected).max() / max(1, np.abs(expected).max())
    assert error <= TOLERANCES[precision]
    if part.kind not in ("head", "shortcut"):  # a head computes in fp32; this shortcut only averages and pads
        assert error > 0, "nothing was rounded: the part is not in half precision"


def test_half_block_computes_what_torch_half_computes(bundle, tiny):
    _, model = _convert(bundle, "block_00")
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 16, 32, 32)).astype(np.float16))
    module = fold_batch_norm(copy.deepcopy(part_modules(tiny.model)["block_00"])).half()
    with torch.inference_mode():
        expected = module(x).float().numpy()
    actual = OnnxReference(model.SerializeToString()).run({"x": x.numpy()})["y"].astype(np.float32)
    np.testing.assert_allclose(actual, expected, atol=2e-2, rtol=TOLERANCES["fp16"])  # another order of rounded sums


@PRECISIONS
def test_every_part_of_imagenet_networks_converts(export_random, precision):
    bundle = Bundle.open(export_random("resnet18", size=64).bundle)
    for part in bundle.network.parts:
        # the checker and type inference accept it
        half_from_fp32(bundle.part_path(part).read_bytes(), part, precision)


def _relu_part(kind="block"):
    x, y = TensorSpec(name="x", shape=("N", 1)), TensorSpec(name="y", shape=("N", 1))
    return PartSpec(name="p", kind=kind, index=0, reads=("x",), writes=("x",), inputs=(x,), outputs=(y,), flops=0)


def _model(nodes, weights=()):
    infos = [helper.make_tensor_value_info(name, FLOAT, ["N", 1]) for name in "xy"]
    graph = helper.make_graph(nodes, "p", infos[:1], infos[1:], [numpy_helper.from_array(*w) for w in weights])
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def test_weight_too_large_for_half_is_named():
    model = _model([helper.make_node("Mul", ["x", "w"], ["y"])], [(np.array([1, -7e4], np.float32), "w")])
    with pytest.raises(ExportError, match=r"part 'p': weight 'w' reaches 7e\+04, fp16 ends at 65504"):
        half_from_fp32(model, _relu_part(), "fp16")


def test_output_that_is_also_read_inside_stays_readable():
    nodes = [
        helper.make_node("Softmax", ["x"], ["y"]),
        helper.make_node("Relu", ["y"], ["unused"]),
    ]
    model = onnx.ModelProto.FromString(half_from_fp32(_model(nodes), _relu_part(), "fp16"))
    assert _types(model.graph.output) == [HALF["fp16"]]
    OnnxReference(model.SerializeToString()).run({"x": np.ones((1, 1), np.float16)})


def test_tensor_that_two_operators_read_in_fp32_is_cast_once():
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"]),
        helper.make_node("Sigmoid", ["a"], ["c"]),
        helper.make_node("Mul", ["b", "c"], ["y"]),
    ]
    model = onnx.ModelProto.FromString(half_from_fp32(_model(nodes), _relu_part(), "fp16"))
    read = [node.input[0] for node in model.graph.node if node.op_type in ("Softmax", "Sigmoid")]
    assert read[0] == read[1] != "a"
    [y] = OnnxReference(model.SerializeToString()).run({"x": np.full((1, 1), 2, np.float16)}).values()
    np.testing.assert_allclose(y, 1 / (1 + np.exp(-2)), rtol=1e-3)


def test_values_that_are_only_moved_keep_their_precision():
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("Softmax", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["y"]),
    ]
    noted = onnx.ModelProto.FromString(_model(nodes))
    noted.graph.value_info.append(helper.make_tensor_value_info("a", FLOAT, ["N", 1]))  # no longer true
    model = onnx.ModelProto.FromString(half_from_fp32(noted.SerializeToString(), _relu_part(), "fp16"))
    assert [node.op_type for node in model.graph.node] == [
        "Relu", "Flatten", "Cast", "Softmax", "Flatten", "Sigmoid", "Cast"
    ]  # fmt: skip


def test_weight_shared_by_both_precisions_serves_both():
    w = (np.array([[0.1]], np.float32), "w")
    nodes = [helper.make_node("Mul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    model = half_from_fp32(_model(nodes, [w]), _relu_part(), "fp16")
    [y] = OnnxReference(model).run({"x": np.full((1, 1), 2, np.float16)}).values()
    np.testing.assert_allclose(y, 2 * 0.1 * 0.1, rtol=2e-3)


def test_model_with_subgraphs_is_refused():
    branch = helper.make_graph([], "b", [], [])
    with pytest.raises(ExportError, match="subgraphs cannot be converted"):
        half_from_fp32(_model([helper.make_node("If", ["x"], ["y"], then_branch=branch)]), _relu_part(), "fp16")

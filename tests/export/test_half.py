"""FP16 parts hold the weights that PyTorch's `half()` gives, and keep in FP32 what decides."""

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
from export.half import fp16_from_fp32
from export.half_spec import half_network, half_part
from export.onnx_model import fold_batch_norm

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
# fp16 keeps 11 bits: each of a few thousand products and each stored activation is rounded by up to 2^-11 = 5e-4
HALF_TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def bundle(tiny):
    return Bundle.open(tiny.bundle)


def _convert(bundle, name):
    part = bundle.network.part(name)
    return part, onnx.ModelProto.FromString(fp16_from_fp32(bundle.part_path(part).read_bytes(), part))


def _types(infos):
    return [info.type.tensor_type.elem_type for info in infos]


@pytest.mark.parametrize(
    ("name", "input_type", "output_type"),
    [
        ("stem", FLOAT, HALF),
        ("block_00", HALF, HALF),
        ("shortcut_01", HALF, HALF),
        ("head", HALF, FLOAT),
        ("full", FLOAT, FLOAT),
        ("policy", FLOAT, FLOAT),
    ],
)
def test_only_activations_between_parts_are_half(bundle, name, input_type, output_type):
    part, model = _convert(bundle, name)
    assert (_types(model.graph.input), _types(model.graph.output)) == ([input_type], [output_type])
    typed = half_network(bundle.network).part(name)
    dtypes = {FLOAT: "float32", HALF: "float16"}
    assert (typed.inputs[0].dtype, typed.outputs[0].dtype) == (dtypes[input_type], dtypes[output_type])
    assert typed.inputs[0].shape == part.inputs[0].shape


def test_weights_are_those_of_torch_half(bundle, tiny):
    for name in ("stem", "block_00", "block_02"):
        _, model = _convert(bundle, name)
        weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer if w.data_type == HALF}
        expected = fold_batch_norm(part_modules(tiny.model)[name]).half().state_dict()
        assert set(weights) == set(expected)
        for key, tensor in expected.items():
            np.testing.assert_array_equal(weights[key], tensor.numpy(), err_msg=f"{name} {key}")


def test_policy_and_classifier_keep_their_fp32_weights(bundle):
    part = bundle.network.part("policy")
    original = bundle.part_path(part).read_bytes()
    assert fp16_from_fp32(original, part) == original
    for name in ("head", "full"):
        _, model = _convert(bundle, name)
        [gemm] = [node for node in model.graph.node if node.op_type == "Gemm"]
        types = {weight.name: weight.data_type for weight in model.graph.initializer}
        assert {types[weight] for weight in gemm.input[1:]} == {FLOAT}


def test_head_pools_and_classifies_in_fp32_without_a_way_back(bundle):
    _, model = _convert(bundle, "head")
    assert [node.op_type for node in model.graph.node].count("Cast") == 1


@pytest.mark.parametrize("name", ["stem", "block_00", "block_01", "shortcut_01", "head", "full"])
def test_half_parts_compute_what_the_fp32_parts_compute(bundle, name):
    part, model = _convert(bundle, name)
    rng = np.random.default_rng(0)
    x = rng.normal(size=part.inputs[0].shape_for(2)).astype(np.float32)
    half_x = x.astype(half_part(part).inputs[0].dtype)
    [expected] = OnnxReference(bundle.part_path(part).read_bytes()).run({part.inputs[0].name: x}).values()
    [actual] = OnnxReference(model.SerializeToString()).run({part.inputs[0].name: half_x}).values()
    assert actual.dtype == half_part(part).outputs[0].dtype
    error = np.abs(actual.astype(np.float32) - expected).max() / max(1, np.abs(expected).max())
    assert error <= HALF_TOLERANCE
    if part.kind not in ("head", "shortcut"):  # a head computes in fp32; this shortcut only averages and pads
        assert error > 0, "nothing was rounded: the part is not in half precision"


def test_half_block_computes_what_torch_half_computes(bundle, tiny):
    _, model = _convert(bundle, "block_00")
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 16, 32, 32)).astype(np.float16))
    module = fold_batch_norm(copy.deepcopy(part_modules(tiny.model)["block_00"])).half()
    with torch.inference_mode():
        expected = module(x).float().numpy()
    actual = OnnxReference(model.SerializeToString()).run({"x": x.numpy()})["y"].astype(np.float32)
    np.testing.assert_allclose(actual, expected, atol=2e-2, rtol=HALF_TOLERANCE)  # another order of rounded sums


def test_every_part_of_imagenet_networks_converts(export_random):
    bundle = Bundle.open(export_random("resnet18", size=64).bundle)
    for part in bundle.network.parts:
        fp16_from_fp32(bundle.part_path(part).read_bytes(), part)  # the checker and type inference accept it


def _relu_part(kind="block"):
    x, y = TensorSpec(name="x", shape=("N", 1)), TensorSpec(name="y", shape=("N", 1))
    return PartSpec(name="p", kind=kind, index=0, reads=("x",), writes=("x",), inputs=(x,), outputs=(y,), flops=0)


def _model(nodes, weights=()):
    infos = [helper.make_tensor_value_info(name, FLOAT, ["N", 1]) for name in "xy"]
    graph = helper.make_graph(nodes, "p", infos[:1], infos[1:], [numpy_helper.from_array(*w) for w in weights])
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def test_weight_too_large_for_half_is_named():
    model = _model([helper.make_node("Mul", ["x", "w"], ["y"])], [(np.array([7e4], np.float32), "w")])
    with pytest.raises(ExportError, match=r"part 'p': weight 'w' reaches 7e\+04, fp16 ends at 65504"):
        fp16_from_fp32(model, _relu_part())


def test_output_that_is_also_read_inside_stays_readable():
    nodes = [
        helper.make_node("Softmax", ["x"], ["y"]),
        helper.make_node("Relu", ["y"], ["unused"]),
    ]
    model = onnx.ModelProto.FromString(fp16_from_fp32(_model(nodes), _relu_part()))
    assert _types(model.graph.output) == [HALF]
    OnnxReference(model.SerializeToString()).run({"x": np.ones((1, 1), np.float16)})


def test_weight_shared_by_both_precisions_serves_both():
    w = (np.array([[0.1]], np.float32), "w")
    nodes = [helper.make_node("Mul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    model = fp16_from_fp32(_model(nodes, [w]), _relu_part())
    [y] = OnnxReference(model).run({"x": np.full((1, 1), 2, np.float16)}).values()
    np.testing.assert_allclose(y, 2 * 0.1 * 0.1, rtol=2e-3)


def test_model_with_subgraphs_is_refused():
    branch = helper.make_graph([], "b", [], [])
    with pytest.raises(ExportError, match="subgraphs cannot be converted"):
        fp16_from_fp32(_model([helper.make_node("If", ["x"], ["y"], then_branch=branch)]), _relu_part())

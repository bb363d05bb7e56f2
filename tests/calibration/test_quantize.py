"""INT8 parts: what their ONNX says, and how close it is to fp32."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bdtool.specs import BATCH_AXIS, PartSpec, TensorSpec
from calibration.part_errors import CandidatePart, part_errors
from calibration.paths import PathBatch, part_ranges
from calibration.quantize import direct_operands, quantize_part, watched_tensors
from export.check import OnnxReference
from export.onnx_precision import OUTPUT_RANGE, input_scale, output_scale

ALL = np.ones((16, 3), dtype=bool)


@pytest.fixture(scope="session")
def quantized(bundle, watched, collect):
    """INT8 models of all parts but the policy network, with integer activations."""
    collector = collect(ALL, at_least=4)
    models = {}
    for name, part in watched.items():
        if name != "policy":
            ranges = part_ranges(bundle.network, part, collector, method="min-max", percentile=99.99)
            data = bundle.part_path(part.part).read_bytes()
            models[name] = quantize_part(data, part.part, ranges, integer_activations=True, weights=name != "head")
    return models


def _nodes(data):
    return onnx.ModelProto.FromString(data).graph.node


def test_every_zero_point_is_zero_and_weights_have_a_scale_for_each_channel(quantized):
    model = onnx.ModelProto.FromString(quantized["block_00"])
    initializers = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    zero_points = [initializers[n.input[2]] for n in model.graph.node if n.op_type.endswith("uantizeLinear")]
    assert zero_points
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zero_points)
    weights = [one for one in initializers.values() if one.dtype == np.int8 and one.ndim == 4]
    scales = [one for name, one in initializers.items() if name.endswith("weight_scale")]
    assert [len(weight) for weight in weights] == [len(scale) for scale in scales] == [16, 16]


def test_the_addition_reads_the_quantized_input_and_the_second_convolution_directly(quantized):
    nodes = {output: node for node in _nodes(quantized["block_00"]) for output in node.output}
    [addition] = [node for node in nodes.values() if node.op_type == "Add"]
    producers = [nodes[tensor] for tensor in addition.input]
    assert [node.op_type for node in producers] == ["DequantizeLinear", "Conv"]
    assert producers[0].input[0] == "x"
    assert [entry.key for entry in producers[1].metadata_props] == [OUTPUT_RANGE]


def test_what_an_addition_reads_directly_is_not_cut_by_any_method(bundle, watched, collect):
    part = watched["block_00"]
    nodes = _nodes(bundle.part_path(part.part).read_bytes())
    second = [node.output[0] for node in nodes if node.op_type == "Conv"][1]
    cut, whole = (
        part_ranges(bundle.network, part, collect(ALL, at_least=4), method=method, percentile=50)
        for method in ("percentile", "min-max")
    )
    assert {name for name in cut if cut[name] == whole[name]} == {second}


def _projected():
    """Return a block whose shortcut is a convolution, as ImageNet's are, and its ranges on `images`."""
    random = np.random.default_rng(0)
    x, y = (TensorSpec(name=name, shape=(BATCH_AXIS, 8, 4, 4)) for name in "xy")
    part = PartSpec(
        name="block_00", kind="block", index=0, reads=("x",), writes=("x",), inputs=(x,), outputs=(y,), flops=0
    )
    weights = {name: random.normal(size=(8, 8, 1, 1)).astype(np.float32) for name in ("of_shortcut", "of_branch")}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "of_shortcut"], ["shortcut"]),
            helper.make_node("Conv", ["x", "of_branch"], ["branch"]),
            helper.make_node("Add", ["shortcut", "branch"], ["sum"]),
            helper.make_node("Relu", ["sum"], ["y"]),
        ],
        "projected",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, y.shape)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return part, model.SerializeToString(), random.normal(size=(4, 8, 4, 4)).astype(np.float32)


def test_of_two_convolutions_the_addition_reads_that_of_the_shortcut_quantized():
    part, model, x = _projected()
    assert direct_operands(onnx.ModelProto.FromString(model)) == {"branch"}
    assert watched_tensors(onnx.ModelProto.FromString(model)) == ["x", "shortcut", "branch", "y"]
    expected = OnnxReference(model).run({"x": x})["y"]
    data = quantize_part(model, part, dict.fromkeys(("x", "shortcut", "branch", "y"), 12.0), integer_activations=False)
    nodes = {output: node for node in _nodes(data) for output in node.output}
    [addition] = [node for node in nodes.values() if node.op_type == "Add"]
    shortcut, branch = (nodes[tensor] for tensor in addition.input)
    assert (shortcut.op_type, nodes[shortcut.input[0]].input[0]) == ("DequantizeLinear", "shortcut")
    assert (branch.op_type, [entry.key for entry in branch.metadata_props]) == ("Conv", [OUTPUT_RANGE])
    assert np.abs(CandidatePart(part, data).run(x) - expected).max() < 0.05 * expected.max()


def test_blocks_of_a_stage_share_one_scale(quantized):
    models = {name: onnx.ModelProto.FromString(data) for name, data in quantized.items()}
    assert output_scale(models["stem"], "y") == input_scale(models["block_00"], "x")
    assert output_scale(models["block_00"], "y") == input_scale(models["block_01"], "x")
    assert output_scale(models["block_01"], "y") == output_scale(models["shortcut_01"], "y")
    assert output_scale(models["block_02"], "y") == input_scale(models["head"], "x")


def test_what_a_block_reads_and_writes_has_one_scale_whatever_its_range(bundle, watched):
    part = watched["block_00"]
    data = bundle.part_path(part.part).read_bytes()
    for largest in (0.1, 12.92075290276836, 3.923863274976611):  # float32 holds none of them
        quantized = quantize_part(data, part.part, dict.fromkeys(part.watched, largest), integer_activations=True)
        model = onnx.ModelProto.FromString(quantized)
        assert output_scale(model, "y") == input_scale(model, "x")


def test_parts_stay_close_to_fp32(bundle, quantized, pixels):
    batch = PathBatch(first=0, images=pixels, keep=ALL)
    network = bundle.network.with_activation("int8")
    errors = part_errors(network, lambda part: bundle.part_path(part).read_bytes(), quantized, batch)
    assert set(errors) == set(quantized)
    assert all(0 < one.error < 0.05 for one in errors.values())  # of the range; one integer step is 0.008


def test_a_few_saturated_values_pass_and_a_wrong_scale_does_not(bundle, watched, collect, pixels):
    part = watched["stem"]
    ranges = part_ranges(bundle.network, part, collect(ALL), method="min-max", percentile=99.99)
    network, batch = bundle.network.with_activation("int8"), PathBatch(first=0, images=pixels, keep=ALL)

    def error(share):
        cut = {name: largest * (share if name == "y" else 1) for name, largest in ranges.items()}
        data = quantize_part(bundle.part_path(part.part).read_bytes(), part.part, cut, integer_activations=True)
        return part_errors(network, lambda p: bundle.part_path(p).read_bytes(), {"stem": data}, batch)["stem"]

    assert error(0.6).ok
    assert not error(0.1).ok


def test_a_float_block_gives_float_and_the_head_keeps_its_weights(bundle, watched, collect, quantized, pixels):
    part = watched["block_00"]
    ranges = part_ranges(bundle.network, part, collect(ALL, at_least=4), method="min-max", percentile=99.99)
    data = quantize_part(bundle.part_path(part.part).read_bytes(), part.part, ranges, integer_activations=False)
    stem = bundle.network.part("stem")
    x = OnnxReference(bundle.part_path(stem).read_bytes()).run({"image": pixels[:2]})["y"]
    expected = OnnxReference(bundle.part_path(part.part).read_bytes()).run({"x": x})["y"]
    found = CandidatePart(part.part, data).run(x)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    head = onnx.ModelProto.FromString(quantized["head"])
    assert not any(one.data_type == onnx.TensorProto.INT8 and len(one.dims) for one in head.graph.initializer)


def test_quantizing_twice_gives_the_same_bytes(bundle, watched, collect, quantized):
    part = watched["block_01"]
    ranges = part_ranges(bundle.network, part, collect(ALL, at_least=4), method="min-max", percentile=99.99)
    again = quantize_part(bundle.part_path(part.part).read_bytes(), part.part, ranges, integer_activations=True)
    assert again == quantized["block_01"]

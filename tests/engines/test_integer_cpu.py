"""Integer engines compute what their Q/DQ parts say, in integers all the way, with or without VNNI."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bdtool.data.synthetic import synthetic_images
from bdtool.runtime.preprocess import preprocess
from calibration.paths import PathBatch, PathWalker, TopUp, WatchedPart, part_ranges
from calibration.quantize import quantize_part
from calibration.ranges import RangeCollector
from engines import onnxrt
from engines.cpu import has_vnni
from engines.integer_cpu import lower_quantized
from engines.layouts import INTEGER_LAYOUT, pack, run_plain, unpack
from engines.onnxrt import OnnxRuntimeBackend
from export.bundle import Bundle
from export.check import OnnxReference

INTEGER_STEP = 1


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("resnet8", {"shortcut": "option-a"}), id="resnet8"),
        pytest.param(("resnet8", {"shortcut": "average-pool"}), id="resnet8-average"),
        pytest.param(("resnet50", {"size": 96}), id="resnet50", marks=pytest.mark.slow),
    ],
)
def parts(request, export_random):
    """The INT8 parts of a network of basic blocks and of one of bottlenecks, with their specs."""
    arch, options = request.param
    bundle = Bundle.open(export_random(arch, **options).bundle)
    network = bundle.network
    chosen = [part for part in network.parts if part.kind != "full"]
    watched = {part.name: WatchedPart(bundle.part_path(part).read_bytes(), part) for part in chosen}
    size = network.preprocessing
    images = preprocess(synthetic_images(4, height=size.height, width=size.width), size)
    keep = np.ones((4, network.n_blocks), dtype=bool)
    collector = RangeCollector()
    walker = PathWalker(network, watched, TopUp.plan(network, keep, at_least=4))
    walker.add(PathBatch(first=0, images=images, keep=keep), collector)
    typed = network.with_activation("int8")
    result = {}
    for part in [part for part in chosen if part.kind not in ("policy", "head")][:6]:
        ranges = part_ranges(network, watched[part.name], collector, method="min-max", percentile=99.99)
        model = quantize_part(bundle.part_path(part).read_bytes(), part, ranges, integer_activations=True)
        result[part.name] = (typed.part(part.name), model)
    return result


def _feeds(part):
    values = np.random.default_rng(1).normal(size=part.inputs[0].shape_for(3))
    if part.inputs[0].dtype == "int8":
        return {"x": np.clip(np.abs(8 * values).round(), 0, 127).astype(np.int8)}
    return {part.inputs[0].name: values.astype(np.float32)}


def test_layout_packs_and_unpacks():
    values = np.arange(-60, 60, dtype=np.int8).reshape(1, 5, 4, 6)
    packed = pack(values, INTEGER_LAYOUT)
    assert packed.shape == values.shape
    assert packed.view(np.uint8).reshape(1, 4, 6, 5)[0, 0, 1, 0] == int(values[0, 0, 0, 1]) + 128
    assert np.array_equal(unpack(packed, INTEGER_LAYOUT), values)


_VNNI = pytest.param(True, marks=pytest.mark.skipif(not has_vnni(), reason="this processor's 16-bit sums saturate"))


@pytest.mark.parametrize("vnni", [_VNNI, False])
def test_engines_agree_with_their_parts(parts, monkeypatch, vnni):
    monkeypatch.setattr(onnxrt, "has_vnni", lambda: vnni)
    backend = OnnxRuntimeBackend()
    for part, model in parts.values():
        built = backend.build(part, model, layout=INTEGER_LAYOUT)
        engine = backend.load(part, built.data, layout=built.layout)
        feeds = _feeds(part)
        expected, actual = OnnxReference(model).run(feeds)["y"], run_plain(engine, part, feeds)["y"]
        differences = np.abs(actual.astype(int) - expected.astype(int))
        assert actual.dtype == np.int8
        assert np.quantile(differences, 0.99) <= 3 * INTEGER_STEP
        assert differences.mean() < 0.5 * INTEGER_STEP
        if part.kind in ("stem", "shortcut"):  # rounded once, as the part says; a sum may fall on the other side
            assert differences.max() <= INTEGER_STEP
            assert differences.mean() < 0.01 * INTEGER_STEP


def _op_types(part, model, layout=INTEGER_LAYOUT):
    built = OnnxRuntimeBackend().build(part, model, layout=layout)
    return [node.op_type for node in onnx.ModelProto.FromString(built.data).graph.node]


def test_blocks_and_shortcuts_hold_no_float_kernel_and_no_transposition(parts):
    of_kind = {
        kind: {op_type for part, model in parts.values() if part.kind == kind for op_type in _op_types(part, model)}
        for kind in ("block", "shortcut")
    }
    assert of_kind == {"block": {"QLinearConv", "QLinearAdd", "Clip"}, "shortcut": {"QLinearConv"}}


def test_image_is_convolved_in_floats_where_an_output_is_of_few_values(parts):
    part, model = parts["stem"]
    few = ["QuantizeLinear", "DequantizeLinear", "Conv", "ReorderOutput", "QuantizeLinear"]
    many = ["QuantizeLinear", "Transpose", "QLinearConv", "Clip", "NhwcMaxPool"]
    assert _op_types(part, model) == (few if part.outputs[0].shape[1] == 16 else many)


def test_policy_network_in_floats_is_fused_as_in_a_network_of_floats(tiny_bundle):
    part = tiny_bundle.network.part("policy")
    model = tiny_bundle.part_path(part).read_bytes()
    native = OnnxRuntimeBackend().activation_layout(tiny_bundle.network)
    assert _op_types(part, model) == _op_types(part, model, native)


def test_bound_buffers_give_what_run_gives(parts):
    backend = OnnxRuntimeBackend()
    part, model = parts["block_00"]
    built = backend.build(part, model, layout=INTEGER_LAYOUT)
    engine = backend.load(part, built.data, layout=built.layout)
    x = pack(_feeds(part)["x"], INTEGER_LAYOUT)
    source, result = (backend.allocate(t.shape_for(3), t.dtype) for t in (part.inputs[0], part.outputs[0]))
    source.write(x)
    engine.bind({"x": source}, {"y": result})()
    assert np.array_equal(result.read(), engine.run({"x": x})["y"])


def _between_integers(nodes, constants, *, channels=8):
    """Return a Q/DQ model from int8 [N, 4, 9, 9], by `nodes` from "floats" to "result", to int8."""
    constants = {"scale": np.float32(0.1), "zero": np.int8(0), **constants}
    ends = [
        helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["floats"]),
        helper.make_node("QuantizeLinear", ["result", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        [ends[0], *nodes, ends[1]],
        "hand-made",
        [helper.make_tensor_value_info("x", TensorProto.INT8, ["N", 4, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, ["N", channels, "H", "W"])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _lowered(model):
    """Rewrite the model, compare what it computes with what it did, and return its operators."""
    x = np.random.default_rng(0).integers(-128, 128, size=(2, 4, 9, 9)).astype(np.int8)
    expected = OnnxReference(model.SerializeToString()).run({"x": x})["y"]
    lower_quantized(model, unsigned_weights=False)
    packed = (x.view(np.uint8) ^ 128).transpose(0, 2, 3, 1)
    actual = OnnxReference(model.SerializeToString()).run({"x": packed})["y"].transpose(0, 3, 1, 2)
    assert np.abs((actual ^ 128).view(np.int8).astype(int) - expected).max() <= INTEGER_STEP
    return [node.op_type for node in model.graph.node]


_WINDOWS = {"kernel_shape": [2, 2], "strides": [2, 2]}


@pytest.mark.parametrize(
    ("pooling", "is_folded"),
    [
        (_WINDOWS, True),
        ({"kernel_shape": [3, 2]}, True),
        ({**_WINDOWS, "pads": [1, 1, 1, 1]}, False),
        ({**_WINDOWS, "ceil_mode": 1}, False),
        ({**_WINDOWS, "dilations": [2, 2]}, False),
    ],
)
def test_averages_of_whole_windows_become_part_of_an_integer_convolution(pooling, is_folded):
    nodes = [
        helper.make_node("AveragePool", ["floats"], ["averages"], **pooling),
        helper.make_node("Pad", ["averages", "pads"], ["result"]),
    ]
    op_types = _lowered(_between_integers(nodes, {"pads": np.array([0, 1, 0, 0, 0, 3, 0, 0])}))
    assert ("AveragePool" not in op_types) == is_folded
    assert op_types.count("DequantizeLinear") == (2 if is_folded else 1)  # of the selection, too


@pytest.mark.parametrize("weight", [np.random.default_rng(1).normal(size=(8, 4, 1, 1)), np.ones((8, 4, 1, 1))])
def test_convolution_of_float_weights_stays_one(weight):
    weight = weight.astype(np.float32)  # the sums of ones would be beyond the steps of what is summed
    nodes = [helper.make_node("Conv", ["floats", "weight"], ["result"])]
    assert _lowered(_between_integers(nodes, {"weight": weight})).count("DequantizeLinear") == 1

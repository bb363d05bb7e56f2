"""Nodes said with convolutions and poolings compute what they did; whatever has another form stays as it is."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.blocked_nodes import stay_blocked
from export.check import OnnxReference

_INT64_MAX = np.iinfo(np.int64).max


def _model(nodes, constants, n_outputs=1):
    graph = helper.make_graph(
        nodes,
        "hand-made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16, 9, 8])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "C", "H", "W"])
            for name in ("y", "z")[:n_outputs]
        ],
        [numpy_helper.from_array(np.array(values), name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _slice(source, target, *, axis, step, start=0, end=_INT64_MAX):
    names = [f"{target}_{part}" for part in ("start", "end", "axis", "step")]
    constants = {name: [value] for name, value in zip(names, (start, end, axis, step), strict=True)}
    return helper.make_node("Slice", [source, *names], [target]), constants


def _pad(source, pads=(0, 8, 0, 0, 0, 8, 0, 0), **attributes):
    return helper.make_node("Pad", [source, "pads"], ["y"], **attributes), {"pads": list(pads)}


def _op_types_after(model):
    """Rewrite the model, compare what it computes with what it did, and return its operators."""
    x = np.random.default_rng(0).normal(size=(3, 16, 9, 8)).astype(np.float32)
    expected = OnnxReference(model.SerializeToString()).run({"x": x})
    stay_blocked(model)
    onnx.checker.check_model(model, full_check=True)
    actual = OnnxReference(model.SerializeToString()).run({"x": x})
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, atol=1e-6, rtol=0)
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("before_after", [(0, 16), (8, 8), (3, 0), (0, 0)])
def test_padded_channels_become_a_convolution(before_after):
    before, after = before_after
    node, constants = _pad("x", (0, before, 0, 0, 0, after, 0, 0), mode="constant")
    assert _op_types_after(_model([node], constants)) == ["Conv"]


def test_strided_slices_become_strides_of_the_convolution():
    rows, constants = _slice("x", "rows", axis=2, step=2)
    columns, more = _slice("rows", "columns", axis=3, step=3)
    node, pads = _pad("columns")
    assert _op_types_after(_model([rows, columns, node], constants | more | pads)) == ["Conv"]


def test_slice_that_something_else_reads_stays():
    rows, constants = _slice("x", "z", axis=2, step=2)
    node, pads = _pad("z")
    assert _op_types_after(_model([rows, node], constants | pads, n_outputs=2)) == ["Slice", "Conv"]


@pytest.mark.parametrize(
    "form", [{"axis": 1, "step": 1, "end": 8}, {"axis": 2, "step": 1, "start": 1}, {"axis": 3, "step": 1, "end": 4}]
)
def test_slice_of_another_form_stays(form):
    cut, constants = _slice("x", "cut", **form)
    node, pads = _pad("cut")
    assert _op_types_after(_model([cut, node], constants | pads)) == ["Slice", "Conv"]


@pytest.mark.parametrize("pads", [(0, 0, 1, 1, 0, 0, 1, 1), (1, 8, 0, 0, 0, 8, 0, 0), (0, -1, 0, 0, 0, 8, 0, 0)])
def test_pad_of_something_else_than_channels_stays(pads):
    node, constants = _pad("x", pads)
    assert _op_types_after(_model([node], constants)) == ["Pad"]


def test_pad_with_other_values_than_zero_stays():
    node, constants = _pad("x")
    node.input.append("value")
    assert _op_types_after(_model([node], constants | {"value": np.float32(1)})) == ["Pad"]
    reflected, constants = _pad("x", (0, 8, 0, 0, 0, 8, 0, 0), mode="reflect")
    assert _op_types_after(_model([reflected], constants)) == ["Pad"]


@pytest.mark.parametrize(
    ("axes", "keepdims", "expected"),
    [([2, 3], 1, "GlobalAveragePool"), ([-1, -2], 1, "GlobalAveragePool"), ([2], 1, "ReduceMean")],
)
def test_averages_of_whole_planes_become_poolings(axes, keepdims, expected):
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)
    assert _op_types_after(_model([node], {"axes": axes})) == [expected]

"""Averages, strides and channels of zeros said as one convolution compute what they did, in every type."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.selections import convolve_shortcuts
from export.check import OnnxReference

_AVERAGE = {"kernel_shape": [2, 2], "strides": [2, 2]}


def _model(nodes, constants, dtype=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes,
        "hand-made",
        [helper.make_tensor_value_info("x", dtype, ["N", 4, 9, 8])],
        [helper.make_tensor_value_info("y", dtype, ["N", "C", "H", "W"])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _op_types_after(model, dtype=np.float32):
    """Rewrite the model, compare what it computes with what it did, and return its operators."""
    x = np.random.default_rng(0).normal(size=(2, 4, 9, 8)).astype(dtype)
    expected = OnnxReference(model.SerializeToString()).run({"x": x})["y"]
    convolve_shortcuts(model)
    onnx.checker.check_model(model, full_check=True)
    actual = OnnxReference(model.SerializeToString()).run({"x": x})["y"]
    np.testing.assert_allclose(actual, expected, atol=1e-6 if dtype == np.float32 else 1e-3, rtol=0)
    return [node.op_type for node in model.graph.node]


def _shortcut(**average):
    nodes = [
        helper.make_node("AveragePool", ["x"], ["averages"], **average),
        helper.make_node("Pad", ["averages", "pads"], ["y"]),
    ]
    return nodes, {"pads": np.array([0, 1, 0, 0, 0, 3, 0, 0])}


@pytest.mark.parametrize("average", [_AVERAGE, {"kernel_shape": [3, 2]}, {"kernel_shape": [2, 2], "strides": [1, 3]}])
def test_average_and_channels_of_zeros_are_one_convolution(average):
    assert _op_types_after(_model(*_shortcut(**average))) == ["Conv"]


def test_weights_have_the_type_of_the_activation():
    model = _model(*_shortcut(**_AVERAGE), dtype=TensorProto.FLOAT16)
    assert _op_types_after(model, np.float16) == ["Conv"]
    [weight] = [one for one in model.graph.initializer if one.name != "pads"]
    assert weight.data_type == TensorProto.FLOAT16


@pytest.mark.parametrize("of_pool", [{"pads": [1, 1, 1, 1]}, {"ceil_mode": 1}, {"dilations": [2, 2]}])
def test_averages_of_windows_that_reach_beyond_stay(of_pool):
    assert _op_types_after(_model(*_shortcut(**_AVERAGE, **of_pool))) == ["AveragePool", "Conv"]


@pytest.mark.parametrize(
    "weights",
    [
        {"weight": np.random.default_rng(1).normal(size=(8, 4, 1, 1)).astype(np.float32)},
        {"weight": np.eye(4, dtype=np.float32)[:, :, None, None], "bias": np.arange(4, dtype=np.float32)},
        {"weight": np.pad(np.eye(4, dtype=np.float32)[:, :, None, None], ((0, 0), (0, 0), (0, 1), (0, 1)))},
    ],
)
def test_average_before_another_convolution_stays(weights):
    nodes = [
        helper.make_node("AveragePool", ["x"], ["averages"], **_AVERAGE),
        helper.make_node("Conv", ["averages", *weights], ["y"]),
    ]
    assert _op_types_after(_model(nodes, weights)) == ["AveragePool", "Conv"]


def test_average_that_is_read_twice_stays():
    nodes, constants = _shortcut(**_AVERAGE)
    nodes[-1].output[0] = "padded"
    nodes.append(helper.make_node("Concat", ["padded", "averages"], ["y"], axis=1))
    assert _op_types_after(_model(nodes, constants)) == ["AveragePool", "Conv", "Concat"]

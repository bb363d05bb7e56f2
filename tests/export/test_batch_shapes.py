"""A `Reshape` is given its shape, whatever the exporter made of it."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.batch_shapes import fold_batch_shapes
from export.bundle import Bundle
from export.check import OnnxReference


def _head(*, batch="batch"):
    """Return pooling and a view as onnxscript 0.6 exports them."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Concat", ["n", "channels"], ["shape"], axis=0),
        helper.make_node("Reshape", ["mean", "shape"], ["y"], allowzero=1),
    ]
    constants = {"axes": [2, 3], "channels": [3]}
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(np.array(values), name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_shape_reckoned_from_the_batch_becomes_a_constant():
    model = _head()
    x = np.random.default_rng(0).random((5, 3, 2, 2), np.float32)
    [expected] = OnnxReference(model.SerializeToString()).run({"x": x}).values()
    fold_batch_shapes(model)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["ReduceMean", "Reshape"]
    assert {weight.name for weight in model.graph.initializer} == {"axes", "y_shape"}
    [y] = OnnxReference(model.SerializeToString()).run({"x": x}).values()
    np.testing.assert_array_equal(y, expected)


def test_constant_shape_stays_as_it_is():
    model = _head()
    fold_batch_shapes(model)
    before = model.SerializeToString(deterministic=True)
    fold_batch_shapes(model)
    assert model.SerializeToString(deterministic=True) == before


def test_shape_that_is_not_known_stays_reckoned():
    model = _head()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "channels"
    model.graph.initializer.remove(model.graph.initializer[1])
    model.graph.input.append(helper.make_tensor_value_info("channels", TensorProto.INT64, [1]))
    fold_batch_shapes(model)
    assert [node.op_type for node in model.graph.node] == ["Shape", "ReduceMean", "Concat", "Reshape"]


def test_what_subgraphs_read_stays():
    model = _head()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "ones"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    added = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 3])
    branch = helper.make_graph([helper.make_node("Add", ["y", "ones"], ["z"])], "branch", [], [added])
    model.graph.node.append(helper.make_node("If", ["always"], ["out"], then_branch=branch, else_branch=branch))
    model.graph.output[0].name = "out"
    fold_batch_shapes(model)
    x = np.full((2, 3, 2, 2), 5, np.float32)
    [out] = OnnxReference(model.SerializeToString()).run({"x": x}).values()
    np.testing.assert_array_equal(out, np.full((2, 3), 6))


def test_no_part_reckons_with_shapes(tiny):
    bundle = Bundle.open(tiny.bundle)
    for part in bundle.network.parts:
        nodes = onnx.load(bundle.part_path(part)).graph.node
        assert not {"Shape", "Concat", "Gather"} & {node.op_type for node in nodes}, part.name

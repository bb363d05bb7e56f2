"""Shapes that hold for any batch become constants, whatever version of the exporter wrote the model."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper


def fold_batch_shapes(model: onnx.ModelProto) -> None:
    """Give each `Reshape` a constant shape, -1 for the batch, where nodes reckon it from the batch's size.

    Exporters do so from some version on (onnxscript from 0.7.2). Shapes are reckoned on the CPU: a session that may run
    nothing there, as on a GPU, refuses such a part, and a half-precision one would have to tell integers apart.
    """
    graph = model.graph
    constants = {weight.name for weight in graph.initializer}
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    dims = {info.name: info.type.tensor_type.shape.dim for info in (*typed.value_info, *typed.output)}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] in constants:
            continue
        shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims.get(node.output[0], ())]
        if shape.count(-1) == 1:
            name = f"{node.output[0]}_shape"
            graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
            node.input[1] = name
    _drop_unread(graph)


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes whose outputs nothing reads, and the constants that only they read."""
    outputs = {info.name for info in graph.output}
    while True:
        read = outputs.union(*map(_reads, graph.node))
        unread = [node for node in graph.node if read.isdisjoint(node.output)]
        if not unread:
            return
        theirs = set().union(*map(_reads, unread))
        for node in unread:
            graph.node.remove(node)
        read = outputs.union(*map(_reads, graph.node))
        for weight in [weight for weight in graph.initializer if weight.name in theirs - read]:
            graph.initializer.remove(weight)


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return what a node reads, inside its subgraphs too."""
    inside = (other for attribute in node.attribute if attribute.HasField("g") for other in attribute.g.node)
    return set(node.input).union(*map(_reads, inside))

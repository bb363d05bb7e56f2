"""What TensorRT-RTX needs to build for Turing (compute capability 7.5), where it multiplies no matrices of FP32.

Its convolutions of FP32 it does build there: the last layer of a network, y = W x + b, is one of a single pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

TURING = 75
_OF_GEMM: dict[str, Any] = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def products_as_convolutions(model: bytes) -> bytes:
    """Return the part with each matrix product by constant weights as a 1 x 1 convolution, equal in value.

    Others stay: TensorRT says of them what it does not build.
    """
    parsed = onnx.ModelProto.FromString(model)
    graph = parsed.graph
    weights = {weight.name: weight for weight in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += _convolution(graph, node, weights[node.input[1]]) if _is_linear(node, weights) else [node]
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(parsed.SerializeToString())


def _is_linear(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    usual = all(attributes.get(name, value) == value for name, value in _OF_GEMM.items())
    return node.op_type == "Gemm" and usual and len(node.input) == 3 and set(node.input[1:]) <= weights.keys()


def _convolution(graph: onnx.GraphProto, node: onnx.NodeProto, weight: onnx.TensorProto) -> list[onnx.NodeProto]:
    """Return the nodes in place of a Gemm, their weights added to the graph."""
    image, _, bias = node.input
    [result], name = node.output, node.name or node.output[0]
    transposed = any(one.name == "transB" and one.i for one in node.attribute)
    matrix = numpy_helper.to_array(weight) if transposed else numpy_helper.to_array(weight).T
    constants = {
        "kernel": matrix[:, :, None, None].copy(),
        "pixel": np.array([-1, matrix.shape[1], 1, 1]),
        "row": np.array([-1, matrix.shape[0]]),
    }
    graph.initializer.extend(numpy_helper.from_array(values, f"{name}/{of}") for of, values in constants.items())
    return [
        helper.make_node("Reshape", [image, f"{name}/pixel"], [f"{name}/image"]),
        helper.make_node("Conv", [f"{name}/image", f"{name}/kernel", bias], [f"{name}/products"], name=name),
        helper.make_node("Reshape", [f"{name}/products", f"{name}/row"], [result]),
    ]

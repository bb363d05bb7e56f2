"""The convolution of the image in an INT8 engine, in floats where that is faster on ONNX Runtime's CPU provider.

Its integer convolutions gather the values behind each output first, a few bytes at a time. Of 3 x 3 pixels of 3
channels these are 27, and the blocked kernel for floats takes half of the time; of 7 x 7 pixels they are 147, and
integers are faster (`benchmarks/integers.py`). It computes the same: image and weights are rounded to the engine's
integers first, and so is the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

FEWER_VALUES = 64  # than this behind an output: a choice between the two that were measured
_TO_NHWC = [0, 2, 3, 1]
_PREFIX = "image/"


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The nodes from the image to the integers that stand for the convolution's output.

    Attributes:
        relu: the clip of the integers behind the convolution, if any.
    """

    quantize: onnx.NodeProto
    transpose: onnx.NodeProto
    convolution: onnx.NodeProto
    relu: onnx.NodeProto | None

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        return [node for node in (self.quantize, self.transpose, self.convolution, self.relu) if node is not None]


def convolve_image_in_floats(model: onnx.ModelProto, *, optimise: Callable[[bytes], bytes]) -> None:
    """Replace the integer convolution of the image in an optimised model, in place, where it is of few values.

    Args:
        model: as ONNX Runtime's optimiser leaves an INT8 part.
        optimise: gives the bytes of a model of floats, as the optimiser leaves it.
    """
    graph = model.graph
    found = _find(graph)
    if found is None:
        return
    floats = compose.add_prefix(onnx.ModelProto.FromString(optimise(_in_floats(model, found))), prefix=_PREFIX).graph
    rounded, result = floats.input[0].name, floats.output[0].name
    steps, last = found.convolution.input[6:8], found.nodes[-1]
    chain = [
        found.quantize,
        helper.make_node("DequantizeLinear", [found.quantize.output[0], *found.quantize.input[1:]], [rounded]),
        *floats.node,
        helper.make_node("QuantizeLinear", [result, *steps], last.output, name=f"{_PREFIX}quantize"),
    ]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node == last:
            nodes.extend(chain)
        elif node not in found.nodes:
            nodes.append(node)
    _replace(graph.node, nodes)
    used = {name for node in graph.node for name in node.input}
    _replace(graph.initializer, [one for one in (*floats.initializer, *graph.initializer) if one.name in used])
    del graph.value_info[:]


def _find(graph: onnx.GraphProto) -> _Found | None:
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        transpose = _only_reader(graph, quantize, "Transpose")
        convolution = None if transpose is None else _only_reader(graph, transpose, "QLinearConv")
        if transpose is None or convolution is None:
            continue
        if np.prod(_constant(graph, convolution.input[3]).shape[1:]) < FEWER_VALUES:
            relu = _only_reader(graph, convolution, "Clip")
            return _Found(quantize=quantize, transpose=transpose, convolution=convolution, relu=relu)
    return None


def _only_reader(graph: onnx.GraphProto, node: onnx.NodeProto, op_type: str) -> onnx.NodeProto | None:
    readers = [reader for reader in graph.node if node.output[0] in reader.input]
    return readers[0] if [reader.op_type for reader in readers] == [op_type] else None


def _in_floats(model: onnx.ModelProto, found: _Found) -> bytes:
    """Return a model of the convolution, and of the ReLU after it, from float32 [N, C, H, W] to [N, H, W, C]."""
    graph, inputs = model.graph, found.convolution.input
    weights, scales, zeros = (_constant(graph, name) for name in inputs[3:6])
    per_channel = (-1, *[1] * (weights.ndim - 1))
    weights = (weights.astype(np.float32) - zeros.reshape(per_channel)) * scales.reshape(per_channel)
    constants = {"weight": weights}
    if len(inputs) > 8:
        constants["bias"] = _constant(graph, inputs[8]) * (_constant(graph, inputs[1]) * scales)
    kept = [entry for entry in found.convolution.attribute if entry.name != "channels_last"]
    convolution = helper.make_node("Conv", ["x", *constants], ["convolved"])
    convolution.attribute.extend(kept)
    nodes = [convolution]
    if found.relu is not None:
        nodes.append(helper.make_node("Relu", ["convolved"], ["rectified"]))
    nodes.append(helper.make_node("Transpose", nodes[-1].output, ["y"], perm=_TO_NHWC))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "C", "H", "W"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in constants.items()]
    floats = helper.make_model(
        helper.make_graph(nodes, "image", [x], [y], initializers),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    data: bytes = floats.SerializeToString()
    return data


def _constant(graph: onnx.GraphProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(one for one in graph.initializer if one.name == name))


def _replace(field: Any, values: list[Any]) -> None:
    copies = [type(value).FromString(value.SerializeToString()) for value in values]  # clearing takes those in it
    del field[:]
    field.extend(copies)

"""What precision an ONNX part computes in, and the scales of its integer activations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# Key of a node's metadata: the largest absolute value of its output, for a backend that must quantize it by itself.
OUTPUT_RANGE = "bdtool.output_range"


def precision_of(model: onnx.ModelProto) -> str:
    """Return "int8", "fp16", "bf16" or "fp32": the least precise type among the weights and Q/DQ zero points."""
    kinds = {initializer.data_type for initializer in model.graph.initializer}
    names = {TensorProto.INT8: "int8", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    kinds |= {info.type.tensor_type.elem_type for info in (*model.graph.input, *model.graph.output)}
    return next((name for kind, name in names.items() if kind in kinds), "fp32")


def convolves_in_half(model: onnx.ModelProto) -> bool:
    """Say whether the model, its branches included, has convolutions, all of them with weights of float16."""
    graphs = list(_graphs(model.graph))
    half = {t.name for graph in graphs for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    weights = {node.input[1] for graph in graphs for node in graph.node if node.op_type == "Conv"}
    return bool(weights) and weights <= half


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def input_scale(model: onnx.ModelProto, name: str) -> float | None:
    """Return the scale of an integer input; None where it is no integer."""
    return _scale(
        model, [node for node in model.graph.node if node.op_type == "DequantizeLinear" and name in node.input]
    )


def output_scale(model: onnx.ModelProto, name: str) -> float | None:
    """Return the scale of an integer output; None where it is no integer."""
    return _scale(
        model, [node for node in model.graph.node if node.op_type == "QuantizeLinear" and name in node.output]
    )


def quantizing_scale(model: onnx.ModelProto, name: str) -> float | None:
    """Return the scale on which a part quantizes a float input first thing; None where it does not."""
    return _scale(model, [node for node in model.graph.node if node.op_type == "QuantizeLinear" and name in node.input])


def quantized(values: np.ndarray, scale: float | None, dtype: str) -> np.ndarray:
    """Return float32 values as a part takes them: symmetric int8 on `scale`, or cast to `dtype`."""
    if scale is not None:
        return np.clip(np.rint(values / np.float32(scale)), -127, 127).astype(np.int8)
    return values.astype(numpy_type(dtype))


def dequantized(values: np.ndarray, scale: float | None) -> np.ndarray:
    """Undo `quantized`, float32."""
    return values.astype(np.float32) * np.float32(1 if scale is None else scale)


def numpy_type(dtype: str) -> np.dtype:
    """Return numpy's dtype of a tensor spec's; onnx brings the one of bfloat16."""
    if dtype == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    name: np.dtype = np.dtype(dtype)
    return name


def float32_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a bfloat16 model with the same weights that computes in float32, for runtimes without bfloat16 kernels."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for initializer in copy.graph.initializer:
        if initializer.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(initializer).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    for info in (*copy.graph.input, *copy.graph.output):
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in copy.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    del copy.graph.value_info[:]
    return copy


def _scale(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> float | None:
    scales = {initializer.name: initializer for initializer in model.graph.initializer}
    return float(numpy_helper.to_array(scales[nodes[0].input[1]])) if nodes else None

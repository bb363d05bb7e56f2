"""FP32 ONNX part -> INT8 part with explicit Q/DQ nodes, by onnxruntime.quantization.

What the parts have in common, whoever runs them: symmetric int8 (zero point 0), one weight scale for each output
channel, biases in float. Between blocks the activation `x` is int8 itself, on one scale for each stage, so that a
dropped block passes it on as it is. Every convolution reads a Q/DQ pair, and so does the addition's shortcut operand;
the convolution on the other side feeds the addition directly. That is where TensorRT wants Q/DQ to fuse convolution,
addition and ReLU into one kernel.
Source: TensorRT developer guide, "Working with Quantized Types", Q/DQ placement, quantizing the residual input.

A backend that needs an integer on both sides of the addition (ONNX Runtime's CPU kernels) finds the largest value of
the direct operand in the convolution's metadata, under `OUTPUT_RANGE`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from bdtool.specs import PartSpec
from export.onnx_precision import OUTPUT_RANGE

Q_MAX = 127  # symmetric: -127 to 127, so that negation stays in range
_WEIGHTED = ("Conv", "Gemm", "MatMul")
_SMALLEST_RANGE = 1e-6  # of a tensor that is always 0: any scale will do, but 0 divides


def watched_tensors(model: onnx.ModelProto) -> list[str]:
    """Return the names of the activations whose ranges `quantize_part` needs, in running order.

    These are what convolutions and linear layers read, the operands of additions that they wrote, and the outputs.
    """
    weights = {initializer.name for initializer in model.graph.initializer}
    producers = _producers(model.graph)
    names = [node.input[0] for node in model.graph.node if node.op_type in _WEIGHTED]
    names += [t for node in _additions(model.graph) for t in node.input if _is_weighted(producers.get(t))]
    names += [output.name for output in model.graph.output]
    return [name for name in dict.fromkeys(names) if name not in weights]


def direct_operands(model: onnx.ModelProto) -> set[str]:
    """Return the tensors that reach an addition from a convolution without Q/DQ between."""
    producers = _producers(model.graph)
    found: set[str] = set()
    for node in _additions(model.graph):
        weighted = [tensor for tensor in node.input if _is_weighted(producers.get(tensor))]
        found |= set(weighted[-1:])  # of two, the first is the shortcut's
    return found


def quantize_part(
    model: bytes, part: PartSpec, ranges: Mapping[str, float], *, integer_activations: bool, weights: bool = True
) -> bytes:
    """Return the INT8 part.

    Args:
        model: the part in fp32.
        ranges: largest absolute value of each of the `watched_tensors`, > 0; equal for equal activations `x`.
        weights: quantize convolutions and linear layers; False leaves them float32 between integer activations.
        integer_activations: make `x` int8 in and out; False leaves it float32, as between parts of mixed precision.

    Raises:
        KeyError: a range is missing.
    """
    fp32 = onnx.ModelProto.FromString(model)
    for i, node in enumerate(fp32.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    quantized = _with_qdq(fp32, ranges) if weights else fp32
    if weights:
        _quantize_shortcut_operands(quantized.graph, ranges)
    if integer_activations:
        for activation, tensor in zip(part.reads, part.inputs, strict=True):
            if activation == "x":
                _make_input_integer(quantized.graph, tensor.name, ranges)
        for activation, tensor in zip(part.writes, part.outputs, strict=True):
            if activation == "x":
                _make_output_integer(quantized.graph, tensor.name, ranges)
    _sort_nodes(quantized.graph)
    del quantized.graph.value_info[:]
    quantized.producer_name, quantized.producer_version = fp32.producer_name, fp32.producer_version
    onnx.checker.check_model(quantized, full_check=True)
    data: bytes = quantized.SerializeToString(deterministic=True)
    return data


def scale_of(largest: float) -> np.float32:
    """Return the symmetric int8 scale of a tensor whose largest absolute value is given.

    It is the one that the quantizer gives a convolution's input, whose range it takes as float32: what a part writes
    and what the next one reads have equal scales, to the last bit.
    """
    return np.float32(float(np.float32(max(largest, _SMALLEST_RANGE))) / Q_MAX)


def _with_qdq(fp32: onnx.ModelProto, ranges: Mapping[str, float]) -> onnx.ModelProto:
    """Return the model with Q/DQ before each convolution and linear layer, their weights stored as int8."""
    nodes = [node.name for node in fp32.graph.node if node.op_type in _WEIGHTED]
    if not nodes:
        return fp32
    names = {node.input[0] for node in fp32.graph.node if node.op_type in _WEIGHTED}
    limits = {name: np.float32(max(ranges[name], _SMALLEST_RANGE)) for name in sorted(names)}
    quantizer = QDQQuantizer(
        fp32,
        True,  # per channel
        False,  # no reduced range: backends whose kernels would saturate take unsigned weights instead
        QuantType.QInt8.tensor_type,
        QuantType.QInt8.tensor_type,
        TensorsData(CalibrationMethod.MinMax, {name: (-limit, limit) for name, limit in limits.items()}),
        nodes,
        [],
        list(_WEIGHTED),
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "QDQKeepRemovableActivations": True,
            "OpTypesToExcludeOutputQuantization": list(_WEIGHTED),
        },
    )
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it recommends its own pre-processing, which the exporter has done
    try:
        quantizer.quantize_model()
    finally:
        logging.disable(level)
    model: onnx.ModelProto = quantizer.model.model
    return model


def _quantize_shortcut_operands(graph: onnx.GraphProto, ranges: Mapping[str, float]) -> None:
    """Put Q/DQ on the shortcut operand of each addition, and note the range of a direct one at its convolution."""
    producers = _producers(graph)
    for addition in _additions(graph):
        weighted = [i for i in (0, 1) if _is_weighted(producers.get(addition.input[i]))]
        if len(weighted) == 2:  # shortcut(x) + F(x): the shortcut comes first, see bdtool.models.resnet
            tensor = addition.input[weighted.pop(0)]
            addition.input[0] = _add_qdq(graph, tensor, ranges)
        for i in weighted:
            node = producers[addition.input[i]]
            entry = node.metadata_props.add()
            entry.key, entry.value = OUTPUT_RANGE, repr(float(max(ranges[addition.input[i]], _SMALLEST_RANGE)))


def _make_input_integer(graph: onnx.GraphProto, name: str, ranges: Mapping[str, float]) -> None:
    """Make a graph input int8: it loses its Q node, or gains a DQ node where nothing read it quantized."""
    for node in [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name]:
        _replace_input(graph, node.output[0], name)
        graph.node.remove(node)
        break
    else:
        scale, zero = _add_scale(graph, name, ranges)
        floats = f"{name}_DequantizeLinear_Output"
        _replace_input(graph, name, floats)
        graph.node.append(
            helper.make_node("DequantizeLinear", [name, scale, zero], [floats], name=f"{name}_dequantize")
        )
    _set_type(graph.input, name)


def _make_output_integer(graph: onnx.GraphProto, name: str, ranges: Mapping[str, float]) -> None:
    floats = f"{name}_float"
    for node in graph.node:
        for i, tensor in enumerate(node.output):
            if tensor == name:
                node.output[i] = floats
    _replace_input(graph, name, floats)
    scale, zero = _add_scale(graph, f"{name}_out", {f"{name}_out": ranges[name]})
    graph.node.append(helper.make_node("QuantizeLinear", [floats, scale, zero], [name], name=f"{name}_quantize"))
    _set_type(graph.output, name)


def _add_qdq(graph: onnx.GraphProto, tensor: str, ranges: Mapping[str, float]) -> str:
    scale, zero = _add_scale(graph, tensor, ranges)
    integers, floats = f"{tensor}_QuantizeLinear_Output", f"{tensor}_DequantizeLinear_Output"
    graph.node.append(helper.make_node("QuantizeLinear", [tensor, scale, zero], [integers], name=f"{tensor}_quantize"))
    graph.node.append(
        helper.make_node("DequantizeLinear", [integers, scale, zero], [floats], name=f"{tensor}_dequantize")
    )
    return floats


def _add_scale(graph: onnx.GraphProto, tensor: str, ranges: Mapping[str, float]) -> tuple[str, str]:
    scale, zero = f"{tensor}_scale", f"{tensor}_zero_point"
    graph.initializer.append(numpy_helper.from_array(np.array(scale_of(ranges[tensor])), scale))
    graph.initializer.append(numpy_helper.from_array(np.array(0, dtype=np.int8), zero))
    return scale, zero


def _additions(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    return (node for node in graph.node if node.op_type == "Add")


def _producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in graph.node for output in node.output}


def _is_weighted(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type in _WEIGHTED


def _replace_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for i, tensor in enumerate(node.input):
            if tensor == old:
                node.input[i] = new


def _set_type(infos: object, name: str) -> None:
    for info in list(infos):  # type: ignore[call-overload]
        if info.name == name:
            info.type.tensor_type.elem_type = TensorProto.INT8


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put the nodes in running order, as ONNX demands; the quantizer appends what it adds."""
    known = {info.name for info in (*graph.input, *graph.initializer)} | {""}
    waiting, done = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if set(node.input) <= known]
        assert ready, "the graph has a cycle"
        done += ready
        known |= {output for node in ready for output in node.output}
        waiting = [node for node in waiting if not set(node.output) <= known]
    del graph.node[:]
    graph.node.extend(done)

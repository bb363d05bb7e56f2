"""The shortcuts without parameters as convolutions, whose weights select channels: fewer nodes, and faster ones.

At a change of stage such a shortcut averages or skips pixels and adds channels of zeros, in nodes of three kinds. As
one convolution it is what every library has kernels for. What comes out is compared with the ONNX part like any engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

SPACE = (2, 3)  # the axes of height and width
_ONE = 1.001  # 9 times a ninth, in half precision
_WHOLE_WINDOWS = {"pads": [0, 0, 0, 0], "ceil_mode": 0, "dilations": [1, 1], "auto_pad": b"NOTSET"}  # of AveragePool


def convolve_shortcuts(model: onnx.ModelProto) -> None:
    """Replace averages or strides over pixels, and the channels of zeros after them, by one convolution, in place."""
    select_channels(model)
    average_in_selections(model)


def select_channels(model: onnx.ModelProto) -> None:
    """Replace each `Pad` of channels with zeros, and the strided `Slice` nodes before it, in place.

    A 1x1 convolution takes their place, with one weight of 1 for each channel that is passed on. Equal for finite
    activations; an infinite one makes its pixel's others NaN. Nodes of another form stay as they are.
    """
    graph = model.graph
    constants = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    maps = feature_maps(model)
    for node in [node for node in graph.node if node.op_type == "Pad" and node.input[0] in maps]:
        n_channels, dtype = maps[node.input[0]]
        _replace_pad(graph, node, constants, n_channels, dtype)


def average_in_selections(model: onnx.ModelProto) -> None:
    """Take averages of whole windows into the 1x1 convolutions behind them that select channels, in place."""
    graph = model.graph
    weights = {initializer.name: initializer for initializer in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    for conv in [node for node in graph.node if node.op_type == "Conv" and node.input[1] in weights]:
        pool, weight = producers.get(conv.input[0]), weights[conv.input[1]]
        if pool is None or not _averages_for_one(graph, pool):
            continue
        selected = numpy_helper.to_array(weight)
        if selected.shape[2:] != (1, 1) or len(conv.input) > 2 or not is_selection(selected):
            continue
        kernel = attribute(pool, "kernel_shape", [])
        steps = (attribute(node, "strides", [1, 1]) for node in (conv, pool))
        strides = [a * b for a, b in zip(*steps, strict=True)]
        averaged = np.broadcast_to(selected.astype(np.float32) / np.prod(kernel), (*selected.shape[:2], *kernel))
        weight.CopyFrom(_tensor(weight.name, averaged, weight.data_type))
        inputs, name = [pool.input[0], weight.name], conv.name
        conv.CopyFrom(helper.make_node("Conv", inputs, conv.output, name=name, kernel_shape=kernel, strides=strides))
        graph.node.remove(pool)


def is_selection(weight: np.ndarray) -> bool:
    """Say whether what a convolution gives are inputs, means of inputs, or zeros: its weights are one value, or 0."""
    sums = weight.reshape(len(weight), -1).sum(axis=1, dtype=np.float64)
    return bool(np.isin(weight, (0, weight.max())).all() and (sums <= _ONE).all())


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _replace_pad(
    graph: onnx.GraphProto, pad: onnx.NodeProto, constants: dict[str, np.ndarray], n_in: int, dtype: int
) -> None:
    before_after = _padded_channels(pad, constants)
    if before_after is None:
        return
    source, strides, sliced = _strides_before(graph, pad.input[0], constants)
    n_before, n_after = before_after
    weight = np.zeros((n_before + n_in + n_after, n_in, 1, 1), np.float32)
    weight[n_before : n_before + n_in, :, 0, 0] = np.eye(n_in)
    name = f"{pad.output[0]}_selection"
    graph.initializer.append(_tensor(name, weight, dtype))
    pad.CopyFrom(helper.make_node("Conv", [source, name], pad.output, name=pad.name, strides=strides))
    for node in sliced:
        graph.node.remove(node)


def _padded_channels(pad: onnx.NodeProto, constants: dict[str, np.ndarray]) -> tuple[int, int] | None:
    """Return how many zero channels a Pad puts before and after, or None where it does something else."""
    mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
    value = constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    pads = constants.get(pad.input[1])
    has_axes = len(pad.input) > 3 and bool(pad.input[3])
    if mode != b"constant" or value is None or value.any() or has_axes or pads is None or pads.shape != (8,):
        return None
    n_before, n_after = int(pads[1]), int(pads[5])
    others = np.delete(pads, [1, 5])
    return None if others.any() or min(n_before, n_after) < 0 else (n_before, n_after)


def _strides_before(
    graph: onnx.GraphProto, tensor: str, constants: dict[str, np.ndarray]
) -> tuple[str, list[int], list[onnx.NodeProto]]:
    """Return what the strided slices that make `tensor` read, their strides over height and width, and the slices."""
    strides = [1, 1]
    sliced: list[onnx.NodeProto] = []
    while True:
        maker = next((node for node in graph.node if tensor in node.output), None)
        n_readers = sum(tensor in node.input for node in graph.node) + sum(tensor == o.name for o in graph.output)
        if maker is None or maker.op_type != "Slice" or n_readers != 1:
            return tensor, strides, sliced
        parameters = [constants.get(name) for name in maker.input[1:]]
        if len(parameters) != 4 or any(p is None or p.shape != (1,) for p in parameters):
            return tensor, strides, sliced
        start, end, axis, step = (int(p[0]) for p in parameters if p is not None)
        if start != 0 or end != np.iinfo(np.int64).max or axis not in SPACE or step < 1:
            return tensor, strides, sliced
        strides[SPACE.index(axis)] *= step
        sliced.append(maker)
        tensor = maker.input[0]


def _averages_for_one(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Say whether a node is an AveragePool of whole windows, read once."""
    is_whole = all(attribute(node, name, value) == value for name, value in _WHOLE_WINDOWS.items())
    return node.op_type == "AveragePool" and is_whole and sum(node.output[0] in one.input for one in graph.node) == 1


def feature_maps(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Return channels and element type of the model's tensors of rank 4."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {info.name: info.type.tensor_type for info in (*graph.input, *graph.value_info, *graph.output)}
    maps = {name: (kind.shape.dim, kind.elem_type) for name, kind in types.items() if len(kind.shape.dim) == 4}
    return {name: (dims[1].dim_value, dtype) for name, (dims, dtype) in maps.items() if dims[1].dim_value}


def _tensor(name: str, values: np.ndarray, dtype: int) -> onnx.TensorProto:
    """Return float values as a tensor of that type: what they are of a selection, all of them hold exactly."""
    if dtype == onnx.TensorProto.FLOAT:
        return numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)
    return helper.make_tensor(name, dtype, values.shape, values.ravel())

"""Nodes that ONNX Runtime knows only in plain NCHW, said with nodes that it also knows in its blocked layout.

Its NCHWc kernels are few: convolutions, poolings, sums. A node of another kind between two of them makes it convert to
plain NCHW and back, and what follows is not fused any more. The shortcuts without parameters hold such nodes: one stage
change, kept, then takes eight nodes where three are enough. Said as below, they stay blocked and the residual add and
its ReLU are fused into a convolution. What comes out is compared with the ONNX part like any engine.

The whole network as one engine, the baseline `full`, is left to ONNX Runtime as it was exported.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

_SPACE = (2, 3)  # the axes of height and width


def stay_blocked(model: onnx.ModelProto) -> None:
    """Replace zero-padded channels and averages over the whole plane by convolutions and poolings, in place.

    - `Pad` of channels with zeros, and the strided `Slice` nodes before it: a 1x1 convolution with one weight of 1 for
      each channel that is passed on. Equal for finite activations; an infinite one makes its pixel's others NaN.
    - `ReduceMean` over height and width: `GlobalAveragePool`.

    Nodes of another form stay as they are.
    """
    graph = model.graph
    constants = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    channels = _channels(model)
    for node in [node for node in graph.node if node.op_type in ("Pad", "ReduceMean") and node.input[0] in channels]:
        if node.op_type == "Pad":
            _replace_pad(graph, node, constants, channels[node.input[0]])
        elif _averages_planes(node, constants):
            node.CopyFrom(helper.make_node("GlobalAveragePool", node.input[:1], node.output, name=node.name))


def _replace_pad(graph: onnx.GraphProto, pad: onnx.NodeProto, constants: dict[str, np.ndarray], n_in: int) -> None:
    before_after = _padded_channels(pad, constants)
    if before_after is None:
        return
    source, strides, sliced = _strides_before(graph, pad.input[0], constants)
    n_before, n_after = before_after
    weight = np.zeros((n_before + n_in + n_after, n_in, 1, 1), np.float32)
    weight[n_before : n_before + n_in, :, 0, 0] = np.eye(n_in)
    name = f"{pad.output[0]}_selection"
    graph.initializer.append(numpy_helper.from_array(weight, name))
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
        if start != 0 or end != np.iinfo(np.int64).max or axis not in _SPACE or step < 1:
            return tensor, strides, sliced
        strides[_SPACE.index(axis)] *= step
        sliced.append(maker)
        tensor = maker.input[0]


def _averages_planes(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> bool:
    keeps = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
    axes = constants.get(node.input[1]) if len(node.input) > 1 else None
    return keeps == 1 and axes is not None and sorted(axes % 4) == list(_SPACE)  # -1 and -2 as well


def _channels(model: onnx.ModelProto) -> dict[str, int]:
    """Return the channels of the model's tensors of rank 4."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {info.name: info.type.tensor_type.shape.dim for info in (*graph.input, *graph.value_info, *graph.output)}
    return {name: dims[1].dim_value for name, dims in shapes.items() if len(dims) == 4 and dims[1].dim_value}

"""Engines whose activations stay in ONNX Runtime's own blocked layout, so that chaining them costs no reorders.

On the CPU provider, ONNX Runtime turns convolutions into NCHWc kernels and converts at the borders of each model: a
ReorderInput before the first convolution, a ReorderOutput after the last. A block alone also loses the fusion of its
residual add, whose other operand is the block's own input. Both cost a chain of 54 blocks dearly; a whole ResNet pays
them once. So a part is optimised as it would be in the middle of a network: between two guard convolutions, which the
optimiser puts in the blocked layout. Then the guards and their reorders are cut off again.

What remains is an engine file for this processor only, like any engine file. It is compared with its ONNX part before
anything uses it, and a part that cannot be cut raises LayoutError: the builder then takes plain NCHW for all parts.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bdtool.specs import PartSpec, TensorSpec
from engines.base import LayoutError

NCHWC_DOMAIN = "com.microsoft.nchwc"
_GUARD_IN, _GUARD_OUT = "bdtool_guard_in", "bdtool_guard_out"


def add_guards(model: onnx.ModelProto, part: PartSpec) -> None:
    """Put a 1x1 convolution before each activation input and after each activation output of rank 4, in place."""
    graph = model.graph
    for info, tensor in _activations(graph.input, part.reads, part.inputs):
        guard = _guard(graph, f"{_GUARD_IN}_{tensor.name}", tensor)
        inner = f"{tensor.name}_inner"
        _rename(graph, tensor.name, inner)
        graph.node.insert(0, helper.make_node("Conv", [guard, f"{guard}_weight"], [inner]))
        info.name = guard
    for info, tensor in _activations(graph.output, part.writes, part.outputs):
        guard = _guard(graph, f"{_GUARD_OUT}_{tensor.name}", tensor)
        inner = f"{tensor.name}_inner_out"
        _rename(graph, tensor.name, inner)
        graph.node.append(helper.make_node("Conv", [inner, f"{guard}_weight"], [guard]))
        info.name = guard


def cut_guards(model: onnx.ModelProto, part: PartSpec) -> None:
    """Remove the guards and their reorders from the optimised model, in place; its borders are blocked from then on.

    Raises:
        LayoutError: the optimiser did not leave the guards in the blocked layout.
    """
    graph = model.graph
    for info, tensor in _activations(graph.input, part.reads, part.inputs):
        reorder = _only(part, [n for n in graph.node if info.name in n.input], "ReorderInput")
        guard = _only(part, [n for n in graph.node if reorder.output[0] in n.input], "Conv")
        _rename(graph, guard.output[0], tensor.name)
        _remove(graph, reorder, guard)
        info.name = tensor.name
    for info, tensor in _activations(graph.output, part.writes, part.outputs):
        reorder = _only(part, [n for n in graph.node if info.name in n.output], "ReorderOutput")
        guard = _only(part, [n for n in graph.node if reorder.input[0] in n.output], "Conv")
        _rename(graph, guard.input[0], tensor.name)
        _remove(graph, reorder, guard)
        info.name = tensor.name
    used = {name for node in graph.node for name in node.input}
    weights = [initializer for initializer in graph.initializer if initializer.name in used]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    del graph.value_info[:]


def _activations(
    infos: object, activations: tuple[str, ...], tensors: tuple[TensorSpec, ...]
) -> list[tuple[onnx.ValueInfoProto, TensorSpec]]:
    """Pair the graph's infos with the tensors that carry the activation `x` as feature maps."""
    rows = zip(list(infos), activations, tensors, strict=True)  # type: ignore[call-overload]
    return [(info, tensor) for info, activation, tensor in rows if activation == "x" and len(tensor.shape) == 4]


def _guard(graph: onnx.GraphProto, name: str, tensor: TensorSpec) -> str:
    channels = tensor.shape[1]
    assert isinstance(channels, int)
    values = np.random.default_rng(0).normal(size=(channels, channels, 1, 1)).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(values, f"{name}_weight"))
    return name


def _only(part: PartSpec, nodes: list[onnx.NodeProto], op_type: str) -> onnx.NodeProto:
    if len(nodes) != 1 or nodes[0].op_type != op_type or nodes[0].domain != NCHWC_DOMAIN:
        found = ", ".join(f"{node.domain}.{node.op_type}" for node in nodes) or "nothing"
        raise LayoutError(f"part {part.name!r}: expected one {NCHWC_DOMAIN}.{op_type} at its border, found {found}")
    return nodes[0]


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def _remove(graph: onnx.GraphProto, *nodes: onnx.NodeProto) -> None:
    for node in nodes:
        graph.node.remove(node)

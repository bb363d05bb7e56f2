"""Several parts composed into one ONNX model, by joining their graphs end to end."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import compose

from bdtool.specs import PartSpec


def compose_parts(name: str, parts: Sequence[tuple[PartSpec, bytes]], *, check: bool = True) -> bytes:
    """Return one ONNX model that runs `parts` in order, each reading what an earlier one wrote.

    The activations that no earlier part writes become inputs, those of the last part outputs. Names inside a part
    get the part's name as prefix; tensors between parts keep one name each, so nothing is copied.

    `check` runs ONNX's checker and shape inference over the result, which takes longer than composing it.
    """
    graph = onnx.GraphProto(name=name)
    current: dict[str, str] = {}  # activation -> the tensor that holds it now
    model = onnx.ModelProto()
    for part, data in parts:
        piece = compose.add_prefix(onnx.ModelProto.FromString(data), prefix=f"{part.name}/")
        if not model.opset_import:
            model.CopyFrom(piece)
        renames: dict[str, str] = {}
        for activation, info in zip(part.reads, piece.graph.input, strict=True):
            if activation not in current:
                current[activation] = info.name.removeprefix(f"{part.name}/")
                info_in = graph.input.add()
                info_in.CopyFrom(info)
                info_in.name = current[activation]
            renames[info.name] = current[activation]
        _append(graph, piece.graph, renames)
        current.update(zip(part.writes, (info.name for info in piece.graph.output), strict=True))
    _name_outputs(graph, parts[-1][0], piece.graph)
    model.graph.CopyFrom(graph)
    if check:
        onnx.checker.check_model(model, full_check=True)
    composed: bytes = model.SerializeToString(deterministic=True)
    return composed


def _append(graph: onnx.GraphProto, piece: onnx.GraphProto, renames: dict[str, str]) -> None:
    for node in piece.node:
        for i, tensor in enumerate(node.input):
            node.input[i] = renames.get(tensor, tensor)
    graph.node.extend(piece.node)
    graph.initializer.extend(piece.initializer)


def _name_outputs(graph: onnx.GraphProto, last: PartSpec, piece: onnx.GraphProto) -> None:
    names = {info.name: tensor.name for info, tensor in zip(piece.output, last.outputs, strict=True)}
    for node in graph.node:
        for tensors in (node.input, node.output):
            for i, tensor in enumerate(tensors):
                tensors[i] = names.get(tensor, tensor)
    for info in piece.output:
        output = graph.output.add()
        output.CopyFrom(info)
        output.name = names[info.name]

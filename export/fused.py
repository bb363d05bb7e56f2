"""The whole dynamic network as one ONNX model: policy included, an `If` for each block.

For deployments that can hold only one file. It takes one image at a time, because an `If` has one condition:

    image  float32 [1, 3, H, W]     preprocessed; uint8 [1, H, W, 3] of parts that take pixels
    force  uint8 [K], optional      0: the policy decides, 1: keep, 2: drop; zeros unless given
    logits float32 [1, classes]
    keep   bool [K]                 which blocks ran

Without a policy network it keeps the blocks of the mask that the network was trained for, or every one, where not
forced otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import compose, helper, numpy_helper

from bdtool.specs import NetworkSpec, PartSpec, TensorSpec
from export.fused_spec import FORCE_DROP, FORCE_KEEP, fused_spec


def fuse_parts(network: NetworkSpec, pieces: Mapping[str, bytes], *, check: bool = True) -> bytes:
    """Return the fused model made of the ONNX models of the network's parts, all but `full`, by part name.

    `check` runs ONNX's checker and shape inference over the result.
    """
    spec = fused_spec(network)
    build = _Builder(network, pieces)
    image, force = spec.inputs[0].name, spec.inputs[1].name
    conditions = build.conditions(image, force, keep=spec.outputs[1].name)
    x = build.inline(network.require("stem"), image)
    for k, block in enumerate(network.blocks):
        x = build.choose(conditions[k], block, network.shortcut(k), x)
    build.inline(network.require("head"), x, output=spec.outputs[0].name)
    model = build.model(spec)
    if check:
        onnx.checker.check_model(model, full_check=True)
    fused: bytes = model.SerializeToString(deterministic=True)
    return fused


class _Builder:
    """Collects the nodes and weights of the fused graph."""

    def __init__(self, network: NetworkSpec, pieces: Mapping[str, bytes]) -> None:
        self._network = network
        self._pieces = pieces
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._first = onnx.ModelProto.FromString(pieces[network.require("stem").name])

    def conditions(self, image: str, force: str, *, keep: str) -> list[str]:
        """Add what decides: the policy network, the threshold and `force`; return one condition for each block."""
        n_blocks = self._network.n_blocks
        policy, decided = self._network.find("policy"), self._network.default_keep()
        if decided is not None:
            self._constant("decided", decided)
        else:
            assert policy is not None
            probability = self.inline(policy, image)
            self._constant("threshold", np.array(self._network.threshold, dtype=np.float32))
            self._constant("flat", np.array([n_blocks], dtype=np.int64))
            self._node("Reshape", [probability, "flat"], ["flat_probability"])
            self._node("GreaterOrEqual", ["flat_probability", "threshold"], ["decided"])
        # ONNX Runtime's CUDA provider compares no uint8, and has Equal of this opset only since 1.27
        self._node("Cast", [force], ["force_number"], to=onnx.TensorProto.INT32)
        for name, least in (("forced", FORCE_KEEP), ("dropped", FORCE_DROP)):
            self._constant(f"least_{name}", np.array(least, dtype=np.int32))
            self._node("GreaterOrEqual", ["force_number", f"least_{name}"], [f"is_{name}"])
        self._node("Not", ["is_dropped"], ["may_run"])
        self._node("Or", ["decided", "is_forced"], ["is_wanted"])
        self._node("And", ["is_wanted", "may_run"], [keep])  # ONNX Runtime has no Where for booleans
        names = [f"keep_{k}" for k in range(n_blocks)]
        self._constant("ones", np.ones(n_blocks, dtype=np.int64))
        self._node("Split", [keep, "ones"], names, axis=0)
        return names

    def inline(self, part: PartSpec, source: str, *, output: str | None = None) -> str:
        """Add a part's nodes to the graph; return the name of its output."""
        nodes, weights, result = _renamed(part, self._pieces[part.name], source, output)
        self._nodes += nodes
        self._weights += weights
        return result

    def choose(self, condition: str, block: PartSpec, shortcut: PartSpec | None, x: str) -> str:
        """Add an `If` that runs the block, or else its shortcut, or else passes `x` on; return the output's name."""
        result = f"{block.name}/chosen"
        kept = self._branch(block, x)
        dropped = self._branch(shortcut, x) if shortcut is not None else self._identity_branch(block, x)
        self._node("If", [condition], [result], then_branch=kept, else_branch=dropped)
        return result

    def model(self, spec: PartSpec) -> onnx.ModelProto:
        inputs = [_info(tensor) for tensor in spec.inputs]
        outputs = [_info(tensor) for tensor in spec.outputs]
        force = spec.inputs[1]
        default = numpy_helper.from_array(np.zeros(force.shape_for(1), dtype=np.uint8), force.name)
        graph = helper.make_graph(self._nodes, "fused", inputs, outputs, [*self._weights, default])
        model = onnx.ModelProto()
        model.CopyFrom(self._first)  # versions and opsets
        model.graph.CopyFrom(graph)
        return model

    def _branch(self, part: PartSpec, x: str) -> onnx.GraphProto:
        nodes, weights, result = _renamed(part, self._pieces[part.name], x, None)
        return helper.make_graph(nodes, part.name, [], [self._result_info(part, result)], weights)

    def _result_info(self, part: PartSpec, name: str) -> onnx.ValueInfoProto:
        """Return the type that a part's file really gives: an engine may keep activations in a layout of its own."""
        info = onnx.ValueInfoProto()
        info.CopyFrom(onnx.ModelProto.FromString(self._pieces[part.name]).graph.output[0])
        info.name = name
        info.type.tensor_type.shape.dim[0].dim_value = 1
        return info

    def _identity_branch(self, block: PartSpec, x: str) -> onnx.GraphProto:
        result = f"{block.name}/passed"
        node = helper.make_node("Identity", [x], [result], name=result)
        return helper.make_graph([node], f"{block.name}_dropped", [], [self._result_info(block, result)])

    def _node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        self._nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}_{outputs[0]}", **attributes))

    def _constant(self, name: str, values: np.ndarray) -> None:
        self._weights.append(numpy_helper.from_array(values, name))


def _renamed(
    part: PartSpec, data: bytes, source: str, output: str | None
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
    """Return a part's nodes and weights under names of its own, reading `source`, and its output's name."""
    piece = compose.add_prefix(onnx.ModelProto.FromString(data), prefix=f"{part.name}/").graph
    result = output or piece.output[0].name
    names = {piece.input[0].name: source, piece.output[0].name: result}
    for node in piece.node:
        for tensors in (node.input, node.output):
            for i, tensor in enumerate(tensors):
                tensors[i] = names.get(tensor, tensor)
    return list(piece.node), list(piece.initializer), result


def _info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, kind, tensor.shape_for(1))

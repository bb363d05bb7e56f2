"""Which nodes of an ONNX part cuDNN runs as one kernel: a convolution with its bias, an addition and the ReLU after it.

Launched one by one, the additions and ReLUs of a small block take as long as its convolutions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import onnx


class FusedConv(NamedTuple):
    """A `Conv` whose result goes, if `addend` says so after the addition of that tensor, to a ReLU and nowhere else."""

    conv: onnx.NodeProto
    addend: str | None
    output: str


Node = onnx.NodeProto | FusedConv


def fuse_convolutions(graph: onnx.GraphProto) -> Sequence[Node]:
    """Return the nodes of a graph in order, each fused convolution in the place of its ReLU."""
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(info.name for info in graph.output)
    makers = {node.output[0]: node for node in graph.node}
    constants = {weight.name for weight in graph.initializer}
    fused: dict[str, FusedConv] = {}
    absorbed: set[str] = set()

    def only_maker(name: str, kind: str) -> onnx.NodeProto | None:
        maker = makers.get(name)
        return maker if maker is not None and maker.op_type == kind and uses[name] == 1 else None

    for node in graph.node:
        if node.op_type != "Relu":
            continue
        conv, addend = only_maker(node.input[0], "Conv"), None
        add = only_maker(node.input[0], "Add")
        if add is not None and not constants & set(add.input):
            addend, summand = add.input
            conv = only_maker(summand, "Conv")
            if conv is None:
                conv, addend = only_maker(addend, "Conv"), summand
        if conv is not None and len(conv.input) == 3:  # with a bias
            fused[node.output[0]] = FusedConv(conv, addend, node.output[0])
            absorbed |= {conv.output[0], node.input[0]}
    return [fused.get(node.output[0], node) for node in graph.node if node.output[0] not in absorbed]

"""Nodes that ONNX Runtime knows only in plain NCHW, said with nodes that it also knows in its blocked layout.

Its NCHWc kernels are few: convolutions, poolings, sums. A node of another kind between two of them makes it convert to
plain NCHW and back, and what follows is not fused any more. The shortcuts without parameters hold such nodes: one stage
change, kept, then takes eight nodes where three are enough. Said as below, they stay blocked and the residual add and
its ReLU are fused into a convolution. What comes out is compared with the ONNX part like any engine.

The whole network as one engine, the baseline `full`, is helped as much: what is left to gain is by leaving out blocks.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from engines.selections import SPACE, feature_maps, select_channels


def stay_blocked(model: onnx.ModelProto) -> None:
    """Replace zero-padded channels and averages over the whole plane by convolutions and poolings, in place.

    - `Pad` of channels with zeros, and the strided `Slice` nodes before it: as `select_channels` says.
    - `ReduceMean` over height and width: `GlobalAveragePool`.

    Nodes of another form stay as they are.
    """
    select_channels(model)
    graph, maps = model.graph, feature_maps(model)
    constants = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "ReduceMean" and node.input[0] in maps]:
        if _averages_planes(node, constants):
            node.CopyFrom(helper.make_node("GlobalAveragePool", node.input[:1], node.output, name=node.name))


def _averages_planes(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> bool:
    keeps = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
    axes = constants.get(node.input[1]) if len(node.input) > 1 else None
    return keeps == 1 and axes is not None and sorted(axes % 4) == list(SPACE)  # -1 and -2 as well

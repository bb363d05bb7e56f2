"""Parts that take pixels as they are: the normalisation moves from the host into the stem and the policy network.

A quarter of the bytes then goes to the device, and the host has nothing to compute. `bdtool.specs` says which tensors
such parts read; here their ONNX is made, of the exported one, when engines are built.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bdtool.errors import ExportError
from bdtool.specs import BATCH_AXIS, IMAGE, PartSpec, Preprocessing


def pixels_from_preprocessed(model: bytes, part: PartSpec, preprocessing: Preprocessing) -> bytes:
    """Return the model with uint8 [N, height, width, 3] in the place of its preprocessed float32 [N, 3, height, width].

    Its values are those of `bdtool.runtime.preprocess`: pixel * scale + offset, in float32.

    Args:
        part: with either kind of input; other inputs stay as they are.

    Raises:
        ExportError: the model does not read preprocessed images under the part's name for them.
    """
    proto = onnx.ModelProto.FromString(model)
    for activation, tensor in zip(part.reads, part.inputs, strict=True):
        if activation == IMAGE:
            _normalise_first(proto.graph, part.name, tensor.name, preprocessing)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _normalise_first(graph: onnx.GraphProto, part: str, name: str, preprocessing: Preprocessing) -> None:
    info = next((info for info in graph.input if info.name == name), None)
    if info is None or info.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise ExportError(
            f"part {part!r}: expected a float32 input {name!r} for preprocessed images, its ONNX has "
            f"{', '.join(info.name for info in graph.input)}. Export the model again"
        )
    prefix, shape = f"bdtool_pixels_{name}", (BATCH_AXIS, preprocessing.height, preprocessing.width, 3)
    cast, scaled, normal, prepared, scale, offset = (
        f"{prefix}_{what}" for what in ("float", "scaled", "normal", "prepared", "scale", "offset")
    )
    for node in graph.node:
        node.input[:] = [prepared if read == name else read for read in node.input]
    # Cast first, since TensorRT computes nothing in uint8; transposed last, since a channels-last copy is free in some
    steps = [
        helper.make_node("Cast", [name], [cast], name=cast, to=TensorProto.FLOAT),
        helper.make_node("Mul", [cast, scale], [scaled], name=scaled),
        helper.make_node("Add", [scaled, offset], [normal], name=normal),
        helper.make_node("Transpose", [normal], [prepared], name=prepared, perm=[0, 3, 1, 2]),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*steps, *rest])
    for constant, values in ((scale, preprocessing.scale), (offset, preprocessing.offset)):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.float32), constant))
    info.CopyFrom(helper.make_tensor_value_info(name, TensorProto.UINT8, shape))

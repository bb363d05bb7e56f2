"""FP32 part -> FP16 part: convolutions and everything between them in half precision, what decides in single.

Strongly typed networks (TensorRT 11, TensorRT-RTX) take precision from the ONNX types alone, so a part must say it.
Weights are rounded as `module.half()` rounds them. Images, keep probabilities and logits stay float32, and so do the
policy network (it is tiny, and a rounded probability near the threshold would flip a block) and the pooling and
classifier of the head (sums over many values).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bdtool.errors import ExportError
from bdtool.specs import PartSpec, TensorSpec
from export.half_spec import half_part

_FP32_OPS = frozenset(("ReduceMean", "GlobalAveragePool", "Gemm", "MatMul", "Softmax", "Sigmoid"))
# operators that only move values stay in the precision of what they move
_MOVING_OPS = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"))
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def fp16_from_fp32(model: bytes, part: PartSpec) -> bytes:
    """Return an FP32 part's ONNX model in FP16; the policy part comes back as it is.

    Args:
        part: as the bundle lists it, or as `half_part` gives it.

    Raises:
        ExportError: a weight does not fit into FP16, or the model holds a subgraph, which is not converted.
    """
    if part.kind == "policy":
        return model
    proto = onnx.ModelProto.FromString(model)
    _Converter(proto, half_part(part)).convert()
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


class _Converter:
    """Walks the nodes in order, gives each operator the precision it runs in, and casts where that changes."""

    def __init__(self, model: onnx.ModelProto, part: PartSpec) -> None:
        self._graph = model.graph
        self._part = part
        self._weights = {weight.name: weight for weight in model.graph.initializer}
        self._types: dict[str, int] = {}  # of each float tensor: FLOAT or FLOAT16
        self._nodes: list[onnx.NodeProto] = []
        self._casts: dict[tuple[str, int], str] = {}

    def convert(self) -> None:
        graph = self._graph
        if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
            raise ExportError(f"part {self._part.name!r}: a model with subgraphs cannot be converted to fp16")
        del graph.value_info[:]  # says the old types
        for info, tensor in zip(graph.input, self._part.inputs, strict=True):
            self._types[info.name] = info.type.tensor_type.elem_type = _onnx_type(tensor)
        outputs = {info.name: _onnx_type(t) for info, t in zip(graph.output, self._part.outputs, strict=True)}
        for node in graph.node:
            self._convert_node(node)
        for info in graph.output:
            wanted = outputs[info.name]
            if self._types[info.name] != wanted:
                self._cast_output(info.name, wanted)
            info.type.tensor_type.elem_type = wanted
        del graph.node[:]
        graph.node.extend(self._nodes)

    def _convert_node(self, node: onnx.NodeProto) -> None:
        moves_fp32 = node.op_type in _MOVING_OPS and self._types.get(node.input[0]) == TensorProto.FLOAT
        wanted = TensorProto.FLOAT if moves_fp32 or node.op_type in _FP32_OPS else TensorProto.FLOAT16
        for i, name in enumerate(node.input):
            if name in self._weights:
                node.input[i] = self._weight(name, wanted)
            elif self._types.get(name, wanted) != wanted:
                node.input[i] = self._cast(name, wanted)
        self._nodes.append(node)
        for name in node.output:
            self._types[name] = wanted

    def _weight(self, name: str, wanted: int) -> str:
        """Return the name of that initializer in the type wanted; integers (axes, pads) stay as they are."""
        weight = self._weights[name]
        if weight.data_type not in _FLOATS:
            return name
        if self._types.setdefault(name, wanted) != wanted:
            return self._cast(name, wanted)  # shared by operators of both precisions
        if weight.data_type != wanted:
            values = numpy_helper.to_array(weight)
            with np.errstate(over="ignore"):  # the next line names the weight
                half = values.astype(np.float16)
            if not np.isfinite(half).all():
                raise ExportError(
                    f"part {self._part.name!r}: weight {name!r} reaches {np.abs(values).max():.3g}, fp16 ends at "
                    "65504. Use --precision fp32"
                )
            weight.CopyFrom(numpy_helper.from_array(half, name))
        return name

    def _cast(self, name: str, wanted: int) -> str:
        if (name, wanted) not in self._casts:
            cast = f"{name}_as_{TensorProto.DataType.Name(wanted).lower()}"
            self._nodes.append(helper.make_node("Cast", [name], [cast], name=cast, to=wanted))
            self._casts[name, wanted] = cast
        return self._casts[name, wanted]

    def _cast_output(self, name: str, wanted: int) -> None:
        """Let a Cast write the output, and whatever wrote or read it use another name."""
        inner = f"{name}_before_cast"
        for tensors in _tensor_lists(self._nodes):
            for i, tensor in enumerate(tensors):
                if tensor == name:
                    tensors[i] = inner
        self._nodes.append(helper.make_node("Cast", [inner], [name], name=f"{name}_cast", to=wanted))


def _tensor_lists(nodes: list[onnx.NodeProto]) -> Iterator[list[str]]:
    for node in nodes:
        yield node.input
        yield node.output


def _onnx_type(tensor: TensorSpec) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))

"""FP32 part -> FP16 or BF16 part: convolutions and what lies between them in 16 bits, what decides in single precision.

Strongly typed networks (TensorRT 11, TensorRT-RTX) take precision from the ONNX types alone, so a part must say it.
Weights are rounded as `module.half()` and `module.bfloat16()` round them. Images, keep probabilities and logits stay
float32, and so do the policy network (it is tiny, and a rounded probability near the threshold would flip a block) and
the pooling and classifier of the head (sums over many values).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bdtool.errors import ExportError
from bdtool.specs import PartSpec, TensorSpec
from export.half_spec import HALF_DTYPES
from export.onnx_precision import ONNX_TYPES, numpy_type

_FP32_OPS = frozenset(("ReduceMean", "GlobalAveragePool", "Gemm", "MatMul", "Softmax", "Sigmoid"))
# operators that only move values stay in the precision of what they move
_MOVING_OPS = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"))
_LARGEST = {"fp16": "65504", "bf16": "3.39e38"}
_BFLOAT16_OPSET = 22  # the first whose convolution and pooling take bfloat16; else they are those of 20


def half_from_fp32(model: bytes, part: PartSpec, precision: str) -> bytes:
    """Return an FP32 part's ONNX model in "fp16" or "bf16"; the policy part comes back as it is.

    Args:
        part: as the bundle lists it; the dtype of its activation `x` does not matter.

    Raises:
        ExportError: a weight does not fit into the type, or the model holds a subgraph, which is not converted.
    """
    if part.kind == "policy":
        return model
    proto = onnx.ModelProto.FromString(model)
    _Converter(proto, part.with_activation(HALF_DTYPES[precision]), precision).convert()
    if precision == "bf16":
        for opset in proto.opset_import:
            opset.version = max(opset.version, _BFLOAT16_OPSET) if opset.domain == "" else opset.version
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


class _Converter:
    """Walks the nodes in order, gives each operator the precision it runs in, and casts where that changes."""

    def __init__(self, model: onnx.ModelProto, part: PartSpec, precision: str) -> None:
        self._graph = model.graph
        self._part = part
        self._precision = precision
        self._dtype = numpy_type(HALF_DTYPES[precision])
        self._half = ONNX_TYPES[HALF_DTYPES[precision]]
        self._weights = {weight.name: weight for weight in model.graph.initializer}
        self._types: dict[str, int] = {}  # of each float tensor: FLOAT or the 16-bit type
        self._nodes: list[onnx.NodeProto] = []
        self._casts: dict[tuple[str, int], str] = {}

    def convert(self) -> None:
        graph = self._graph
        if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
            raise ExportError(
                f"part {self._part.name!r}: a model with subgraphs cannot be converted to {self._precision}. "
                "Use --precision fp32"
            )
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
        wanted = TensorProto.FLOAT if moves_fp32 or node.op_type in _FP32_OPS else self._half
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
        if weight.data_type not in (TensorProto.FLOAT, self._half):
            return name
        if self._types.setdefault(name, wanted) != wanted:
            return self._cast(name, wanted)  # shared by operators of both precisions
        if weight.data_type != wanted:
            weight.CopyFrom(self._half_weight(weight))
        return name

    def _half_weight(self, weight: onnx.TensorProto) -> onnx.TensorProto:
        values = numpy_helper.to_array(weight)
        with np.errstate(over="ignore"):  # what follows names the weight
            half = values.astype(self._dtype)
        if not np.isfinite(half.astype(np.float32)).all():
            raise ExportError(
                f"part {self._part.name!r}: weight {weight.name!r} reaches {np.abs(values).max():.3g}, "
                f"{self._precision} ends at {_LARGEST[self._precision]}. Use --precision fp32"
            )
        return onnx.TensorProto(name=weight.name, data_type=self._half, dims=values.shape, raw_data=half.tobytes())

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
    return int(ONNX_TYPES[tensor.dtype])

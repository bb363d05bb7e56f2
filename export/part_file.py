"""Whether an ONNX file is the part that the manifest tells of: whole by itself, and with the part's tensors.

The digest alone says that a file is the one that was listed; people also list files that they made or edited.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper, helper

from bdtool.specs import PartSpec, TensorSpec


def why_unfit(data: bytes, part: PartSpec) -> str | None:
    """Say why `data` cannot be the ONNX file of a part; None where it can."""
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as exc:
        return f"is no ONNX file ({exc})"
    if elsewhere := sorted(set(_locations(model.graph))):  # which would be looked for in the current directory
        return f"keeps weights in another file ({elsewhere[0]}), expected all in one: onnx.save(onnx.load(FILE), FILE)"
    if model.functions:  # joined with other parts, it would lose them
        return "has functions of its own, expected nodes alone: onnx.inliner.inline_local_functions"
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        return f"is no valid ONNX model ({str(exc).strip().splitlines()[0]})"
    return _misfit("inputs", model.graph.input, part.inputs) or _misfit("outputs", model.graph.output, part.outputs)


def _locations(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the files in which a graph, or a graph within it, keeps tensors."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    sparse = [tensor for one in graph.sparse_initializer for tensor in (one.values, one.indices)]
    for tensor in (*graph.initializer, *sparse, *(tensor for one in attributes for tensor in (one.t, *one.tensors))):
        if external_data_helper.uses_external_data(tensor):
            yield external_data_helper.ExternalDataInfo(tensor).location
    for attribute in attributes:
        for inner in (attribute.g, *attribute.graphs):
            yield from _locations(inner)


def _misfit(which: str, infos: object, tensors: tuple[TensorSpec, ...]) -> str | None:
    found = list(infos)  # type: ignore[call-overload]
    expected = ", ".join(f"{tensor.name} {tensor.dtype} {_axes(tensor.shape)}" for tensor in tensors)
    names = [info.name for info in found]
    if names == [tensor.name for tensor in tensors] and all(map(_fits, found, tensors)):
        return None
    return f"has {which} {', '.join(map(_described, found))}, expected {expected}"


def _fits(info: onnx.ValueInfoProto, tensor: TensorSpec) -> bool:
    """Say whether a tensor has that type, and takes or gives that shape; what the file leaves open fits."""
    shape = _shape(info)
    pairs = zip(shape, tensor.shape, strict=False)
    is_open = (isinstance(have, str) or have == want for have, want in pairs)
    return _dtype(info) == tensor.dtype and len(shape) == len(tensor.shape) and all(is_open)


def _described(info: onnx.ValueInfoProto) -> str:
    return f"{info.name} {_dtype(info)} {_axes(_shape(info))}"


def _axes(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _shape(info: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dims = info.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims)


def _dtype(info: onnx.ValueInfoProto) -> str:
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":  # a sequence, for instance
        return kind or "without a type"
    return helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type).name

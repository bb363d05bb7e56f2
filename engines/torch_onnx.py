"""ONNX part -> PyTorch function: the operators that bdtool's exporter writes, each as one torch call.

An unknown operator or attribute is refused by name when the part is built; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from bdtool.errors import EngineError
from bdtool.specs import PartSpec
from engines.torch_fusion import FusedConv, fuse_convolutions
from engines.torch_precision import exact, matrix_products

Function = Callable[[Tensor], Tensor]
_Attributes = Mapping[str, Any]
_DTYPES = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16}


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """Return how feature maps and convolution weights lie in memory where convolutions of that dtype are fastest.

    cuDNN's kernels on tensor cores want channels-last; float32, which without TF32 runs on none, is faster in NCHW.
    """
    return torch.contiguous_format if (device.type, dtype) == ("cuda", torch.float32) else torch.channels_last


class OnnxFunction:
    """A part with one input and one output, as torch calls on `device`.

    Args:
        fuse: let cuDNN run a convolution and what follows it as one kernel.
    """

    def __init__(self, part: PartSpec, model: bytes, device: torch.device, *, fuse: bool) -> None:
        graph = _parsed(part, model)
        if any(weight.data_type == TensorProto.BFLOAT16 for weight in graph.initializer):
            raise EngineError(
                f"part {part.name!r}: the torch backend runs float32 and float16 parts, this one is bfloat16. Use "
                "--precision fp32 or fp16, or --backend tensorrt"
            )
        values = {weight.name: torch.from_numpy(numpy_helper.to_array(weight).copy()) for weight in graph.initializer}
        nodes = fuse_convolutions(graph) if fuse else graph.node
        self._steps = [
            _fused_step(part, node, values, device)
            if isinstance(node, FusedConv)
            else _step(part, node, values, device)
            for node in nodes
        ]
        [self._input] = [info.name for info in graph.input]
        [self._output] = [info.name for info in graph.output]

    def __call__(self, x: Tensor) -> Tensor:
        tensors = {self._input: x}
        for names, output, function in self._steps:
            tensors[output] = function(*(tensors[name] for name in names))
        return tensors[self._output]


def _parsed(part: PartSpec, model: bytes) -> onnx.GraphProto:
    try:
        graph: onnx.GraphProto = onnx.ModelProto.FromString(model).graph
    except Exception as exc:  # protobuf's DecodeError
        raise EngineError(f"part {part.name!r}: its engine is no ONNX model ({exc}); build it again") from exc
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise EngineError(
            f"part {part.name!r}: the torch backend runs parts with one input and one output; this one has "
            f"{len(graph.input)} and {len(graph.output)}"
        )
    return graph


_Step = tuple[tuple[str, ...], str, Callable[..., Tensor]]


def _fused_step(part: PartSpec, fused: FusedConv, weights: Mapping[str, Tensor], device: torch.device) -> _Step:
    function = _bound(part, fused.conv, weights, device, make=_conv_relu)
    return (fused.conv.input[0], *([] if fused.addend is None else [fused.addend])), fused.output, function


def _step(part: PartSpec, node: onnx.NodeProto, weights: Mapping[str, Tensor], device: torch.device) -> _Step:
    """Return (the tensors it reads, the one it writes, the call) of a node, its weights bound."""
    function = _bound(part, node, weights, device)
    return tuple(name for name in node.input if name and name not in weights), node.output[0], function


def _bound(
    part: PartSpec,
    node: onnx.NodeProto,
    weights: Mapping[str, Tensor],
    device: torch.device,
    *,
    make: Callable[..., Callable[..., Tensor]] | None = None,
) -> Callable[..., Tensor]:
    """Return the call of a node, made by `make` or as its operator says, its weights bound."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    try:
        make = make or _OPERATORS[node.op_type]
        return make(attributes, [weights.get(name) for name in node.input], device)
    except (KeyError, ValueError) as exc:
        known = f"; it knows {', '.join(_OPERATORS)}" if node.op_type not in _OPERATORS else f" ({exc})"
        raise EngineError(
            f"part {part.name!r}: the torch backend cannot run node {node.name!r} ({node.op_type}){known}. "
            "Use --backend onnxruntime"
        ) from exc


def _require(attributes: _Attributes, **expected: Any) -> None:
    """Raise ValueError unless each attribute that is there has one of the values that are handled."""
    for name, values in expected.items():
        if name in attributes and attributes[name] not in values:
            raise ValueError(f"attribute {name} is {attributes[name]!r}")


def _symmetric(pads: list[int]) -> tuple[int, int]:
    top, left, bottom, right = pads
    if (top, left) != (bottom, right):
        raise ValueError(f"pads {pads} are not equal on both sides")
    return top, left


class _Convolution(NamedTuple):
    """What `F.conv2d` takes beside the input, in its order."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, int]
    dilation: tuple[int, ...]
    groups: int


def _convolution(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> _Convolution:
    _require(attributes, auto_pad=(b"NOTSET",))
    _, weight, *rest = constants
    if weight is None or weight.dim() != 4 or (rest and rest[0] is None):
        raise ValueError("its weights are not constants of a 2D convolution")
    return _Convolution(
        weight=weight.to(device, memory_format=memory_format(device, weight.dtype)),
        bias=rest[0].to(device) if rest and rest[0] is not None else None,
        stride=tuple(attributes.get("strides", (1, 1))),
        padding=_symmetric(attributes.get("pads", [0, 0, 0, 0])),
        dilation=tuple(attributes.get("dilations", (1, 1))),
        groups=attributes.get("group", 1),
    )


def _conv(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    convolution = _convolution(attributes, constants, device)
    order = memory_format(device, convolution.weight.dtype)
    return lambda x: F.conv2d(x.contiguous(memory_format=order), *convolution)  # mostly it is; pixels are not


def _conv_relu(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Callable[..., Tensor]:
    """Return a call of x, or of x and what is added before the ReLU: one kernel of cuDNN's."""
    weight, bias, stride, padding, dilation, groups = _convolution(attributes, constants, device)
    order = memory_format(device, weight.dtype)

    def call(x: Tensor, addend: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=order)
        if addend is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        addend = addend.contiguous(memory_format=order)
        return torch.cudnn_convolution_add_relu(x, weight, addend, 1.0, bias, stride, padding, dilation, groups)

    return call


def _gemm(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    _require(attributes, alpha=(1.0,), beta=(1.0,), transA=(0,))
    _, weight, bias = constants
    if weight is None or bias is None:
        raise ValueError("its weights are not constants")
    matrix = (weight if attributes.get("transB") else weight.T).contiguous().to(device)
    vector = bias.to(device)
    products = matrix_products(device)
    if weight.dtype != torch.float32:
        return lambda x: F.linear(x, matrix, vector)

    def call(x: Tensor) -> Tensor:
        with exact(products):
            return F.linear(x, matrix, vector)

    return call


def _average_pool(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    _require(attributes, auto_pad=(b"NOTSET",), ceil_mode=(0,), dilations=([1, 1],))
    kernel, stride = tuple(attributes["kernel_shape"]), tuple(attributes.get("strides", (1, 1)))
    padding, counted = _symmetric(attributes.get("pads", [0, 0, 0, 0])), bool(attributes.get("count_include_pad", 0))
    return lambda x: F.avg_pool2d(x, kernel, stride, padding, count_include_pad=counted)


def _max_pool(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    _require(attributes, auto_pad=(b"NOTSET",), ceil_mode=(0,), storage_order=(0,))
    kernel, stride = tuple(attributes["kernel_shape"]), tuple(attributes.get("strides", (1, 1)))
    padding, dilation = _symmetric(attributes.get("pads", [0, 0, 0, 0])), tuple(attributes.get("dilations", (1, 1)))
    return lambda x: F.max_pool2d(x, kernel, stride, padding, dilation)


def _reduce_mean(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    axes, keep = _integers(constants[1]), bool(attributes.get("keepdims", 1))
    return lambda x: x.mean(dim=axes, keepdim=keep)


def _reshape(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    shape = _integers(constants[1])
    if 0 in shape and not attributes.get("allowzero"):
        raise ValueError("its shape copies dimensions of the input")
    return lambda x: x.reshape(shape)


def _slice(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    starts, ends, axes, steps = (_integers(constant) for constant in constants[1:])
    if min(starts + steps) < 0:
        raise ValueError("negative starts or steps")
    cuts = [slice(None)] * 4
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cuts[axis] = slice(start, end, step)
    index = tuple(cuts)
    return lambda x: x[index]


def _pad(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    _require(attributes, mode=(b"constant",))
    if len(constants) > 2 and constants[2] is not None and constants[2].item() != 0:
        raise ValueError(f"pads with {constants[2].item()}")
    pads = _integers(constants[1])
    half = len(pads) // 2
    # ONNX lists all starts, then all ends; torch pairs start and end from the last dimension on
    pairs = [amount for axis in reversed(range(half)) for amount in (pads[axis], pads[half + axis])]
    return lambda x: F.pad(x, pairs)


def _cast(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    dtype = _DTYPES[attributes["to"]]
    return lambda x: x.to(dtype)


def _integers(constant: Tensor | None) -> list[int]:
    if constant is None:
        raise ValueError("a shape that is computed")
    return [int(value) for value in constant.tolist()]


def _with_constant(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Function]:
    """Return a maker of calls of two operands, the second of which may be a constant."""

    def make(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Callable[..., Tensor]:
        first, second = constants
        if first is not None:
            raise ValueError("the first operand is a constant")
        if second is None:
            return function
        constant = second.to(device)
        return lambda x: function(x, constant)

    return make


def _transpose(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Function:
    order = tuple(attributes["perm"])
    return lambda x: x.permute(order)  # no copy: pixels [N, H, W, 3] become [N, 3, H, W] channels-last


def _plain(function: Callable[..., Tensor]) -> Callable[..., Callable[..., Tensor]]:
    def make(attributes: _Attributes, constants: list[Tensor | None], device: torch.device) -> Callable[..., Tensor]:
        if any(constant is not None for constant in constants):
            raise ValueError("an operand is a constant")
        return function

    return make


_OPERATORS: Mapping[str, Callable[..., Callable[..., Tensor]]] = {
    "Conv": _conv,
    "Relu": _plain(torch.relu),
    "Add": _with_constant(torch.add),
    "Mul": _with_constant(torch.mul),
    "Transpose": _transpose,
    "Sigmoid": _plain(torch.sigmoid),
    "Gemm": _gemm,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "ReduceMean": _reduce_mean,
    "Reshape": _reshape,
    "Slice": _slice,
    "Pad": _pad,
    "Cast": _cast,
}

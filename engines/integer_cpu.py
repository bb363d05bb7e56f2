"""INT8 parts as ONNX Runtime's CPU kernels want them: unsigned activations, channels last, integers all the way.

A Q/DQ part says symmetric int8, which suits TensorRT. On the CPU such a part would run its convolutions in float: the
optimiser forms an integer convolution only where its output is quantized and a ReLU is nothing but the lower end of
the range. So the model is rewritten first, without changing what it computes beyond the last bit:

- int8 with zero point 0 becomes uint8 with zero point 128: the same integers, another byte.
- What only one convolution reads after a ReLU gets zero point 0 and twice the resolution; the ReLU is then free.
- A ReLU before any other quantization becomes a clip of the integers.
- The direct operand of an addition is quantized, on the range that the part's calibration noted (`OUTPUT_RANGE`).
- A shortcut without weights becomes a convolution of ones and zeros: the provider's averages of integers are slower
  than floats (`benchmarks/integers.py`).
- Where the processor has no VNNI, weights become unsigned too: its kernels would saturate at 16 bits otherwise.
  Source: ONNX Runtime documentation, "Quantize ONNX models", on U8S8 with AVX2 and AVX512.

Activations of rank 4 enter and leave channels last, which its kernels use; ONNX Runtime's own optimiser then takes the
transpositions out. Buffers keep the part's shape and dtype: only their bytes differ, see `engines.layouts`.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.selections import convolve_shortcuts, is_selection
from export.onnx_precision import OUTPUT_RANGE

_OFFSET = 128
_Q_MAX, _U_MAX = 127, 255
_TO_NCHW, _TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


def is_quantized(model: onnx.ModelProto) -> bool:
    """Say whether a part has Q or DQ nodes."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)


def lower_quantized(model: onnx.ModelProto, *, unsigned_weights: bool) -> None:
    """Rewrite a Q/DQ model in place, as the module says; `unsigned_weights` are for processors without VNNI."""
    convolve_shortcuts(model)
    rewriter = _Rewriter(model.graph)
    rewriter.move_pooling_behind_quantization()
    rewriter.convolve_selections()
    rewriter.quantize_direct_operands()
    rewriter.shift_activations()
    rewriter.absorb_relus()
    if unsigned_weights:
        rewriter.shift_weights()
    rewriter.put_channels_last()


class _Rewriter:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph

    @property
    def _initializers(self) -> dict[str, onnx.TensorProto]:
        return {initializer.name: initializer for initializer in self._graph.initializer}

    @property
    def _producers(self) -> dict[str, onnx.NodeProto]:
        return {output: node for node in self._graph.node for output in node.output}

    def _readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self._graph.node if tensor in node.input]

    def _constant(self, name: str, value: np.generic) -> str:
        if name not in self._initializers:
            self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _insert(self, node: onnx.NodeProto, *, before: onnx.NodeProto) -> None:
        self._graph.node.insert(list(self._graph.node).index(before), node)

    def _activation_nodes(self, op_type: str) -> list[onnx.NodeProto]:
        weights = self._initializers
        return [node for node in self._graph.node if node.op_type == op_type and node.input[0] not in weights]

    def move_pooling_behind_quantization(self) -> None:
        """MaxPool -> Q becomes Q -> MaxPool: rounding keeps the order of values, so the maximum is the same."""
        for quantize in self._activation_nodes("QuantizeLinear"):
            pool = self._producers.get(quantize.input[0])
            if pool is None or pool.op_type != "MaxPool" or len(self._readers(pool.output[0])) != 1:
                continue
            source, result = pool.input[0], quantize.output[0]
            quantize.input[0], quantize.output[0] = source, f"{result}_before_pool"
            pool.input[0], pool.output[0] = quantize.output[0], result
            nodes = list(self._graph.node)
            first, second = nodes.index(pool), nodes.index(quantize)
            nodes[first], nodes[second] = nodes[second], nodes[first]
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del self._graph.node[:]
            self._graph.node.extend(copies)

    def convolve_selections(self) -> None:
        """Let convolutions that select channels, and average them, read and write integers.

        Where an addition reads the result, it is rounded to the steps of what was selected from.
        """
        for conv in [node for node in self._graph.node if node.op_type == "Conv"]:
            weight, steps = self._initializers.get(conv.input[1]), self._steps(conv.input[0])
            if weight is None or steps is None or not is_selection(values := numpy_helper.to_array(weight)):
                continue
            weight.CopyFrom(numpy_helper.from_array((values != 0).astype(np.int8), weight.name))
            scale = self._constant(f"{weight.name}_scale", np.float32(values.max()))
            zero = self._constant(f"{weight.name}_zero", np.int8(0))
            floats = helper.make_node("DequantizeLinear", [weight.name, scale, zero], [f"{weight.name}_floats"])
            self._insert(floats, before=conv)
            conv.input[1] = floats.output[0]
            for addition in [node for node in self._readers(conv.output[0]) if node.op_type == "Add"]:
                self._round(conv.output[0], *steps, before=addition)

    def _steps(self, tensor: str) -> tuple[str, str] | None:
        """Return scale and zero point of an activation that was dequantized, or None."""
        node = self._producers.get(tensor)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] in self._initializers:
            return None
        return node.input[1], node.input[2]

    def quantize_direct_operands(self) -> None:
        producers = self._producers
        for addition in [node for node in self._graph.node if node.op_type == "Add"]:
            for tensor in list(addition.input):
                producer = producers.get(tensor)
                largest = None if producer is None else _noted_range(producer)
                if largest is not None:
                    scale = self._constant(f"{tensor}_range_scale", np.float32(largest / _Q_MAX))
                    zero = self._constant(f"{tensor}_range_zero", np.int8(0))
                    self._round(tensor, scale, zero, before=addition)

    def _round(self, tensor: str, scale: str, zero: str, *, before: onnx.NodeProto) -> None:
        """Let one reader of a tensor read it quantized and dequantized."""
        integers, floats = f"{tensor}_integers", f"{tensor}_floats"
        quantize = helper.make_node("QuantizeLinear", [tensor, scale, zero], [integers], name=integers)
        dequantize = helper.make_node("DequantizeLinear", [integers, scale, zero], [floats], name=floats)
        self._insert(quantize, before=before)
        self._insert(dequantize, before=before)
        for i, name in enumerate(before.input):
            if name == tensor:
                before.input[i] = floats

    def shift_activations(self) -> None:
        zero = self._constant("zero_point_uint8", np.uint8(_OFFSET))
        for op_type in ("QuantizeLinear", "DequantizeLinear"):
            for node in self._activation_nodes(op_type):
                node.input[2] = zero
        for info in (*self._graph.input, *self._graph.output):
            if info.type.tensor_type.elem_type == TensorProto.INT8:
                info.type.tensor_type.elem_type = TensorProto.UINT8

    def absorb_relus(self) -> None:
        outputs = {info.name for info in self._graph.output}
        lowest = self._constant("relu_uint8", np.uint8(_OFFSET))
        for quantize in self._activation_nodes("QuantizeLinear"):
            relu = self._producers.get(quantize.input[0])
            if relu is None or relu.op_type != "Relu" or len(self._readers(relu.output[0])) != 1:
                continue
            reader = self._only_convolution(quantize.output[0])
            if reader is not None and quantize.output[0] not in outputs:
                self._refine(quantize, reader)
                continue
            result = quantize.output[0]
            quantize.input[0], quantize.output[0] = relu.input[0], f"{result}_before_relu"
            position = list(self._graph.node).index(quantize) + 1
            clip = helper.make_node("Clip", [quantize.output[0], lowest], [result], name=f"{result}_relu")
            self._graph.node.insert(position, clip)
            self._graph.node.remove(relu)

    def _only_convolution(self, integers: str) -> onnx.NodeProto | None:
        """Return the DQ node that is the only reader of `integers` and is read by one convolution only."""
        readers = self._readers(integers)
        if len(readers) != 1 or readers[0].op_type != "DequantizeLinear":
            return None
        users = self._readers(readers[0].output[0])
        return readers[0] if [user.op_type for user in users] == ["Conv"] else None

    def _refine(self, quantize: onnx.NodeProto, dequantize: onnx.NodeProto) -> None:
        scale = numpy_helper.to_array(self._initializers[quantize.input[1]])
        finer = self._constant(f"{quantize.output[0]}_scale", np.float32(scale * _Q_MAX / _U_MAX))
        zero = self._constant("zero_point_relu", np.uint8(0))
        for node in (quantize, dequantize):
            node.input[1], node.input[2] = finer, zero

    def shift_weights(self) -> None:
        initializers = self._initializers
        for node in [n for n in self._graph.node if n.op_type == "DequantizeLinear" and n.input[0] in initializers]:
            for name in (node.input[0], node.input[2]):
                values = numpy_helper.to_array(initializers[name])
                if values.dtype == np.int8:
                    initializers[name].CopyFrom(numpy_helper.from_array(values.view(np.uint8) ^ _OFFSET, name))

    def put_channels_last(self) -> None:
        for info in self._integer_maps(self._graph.input):
            inner = f"{info.name}_nchw"
            for node in self._graph.node:
                for i, tensor in enumerate(node.input):
                    if tensor == info.name:
                        node.input[i] = inner
            transpose = helper.make_node("Transpose", [info.name], [inner], name=inner, perm=_TO_NCHW)
            self._graph.node.insert(0, transpose)
            _permute(info, _TO_NHWC)
        for info in self._integer_maps(self._graph.output):
            inner = f"{info.name}_nchw"
            for node in self._graph.node:
                for names in (node.input, node.output):
                    for i, tensor in enumerate(names):
                        if tensor == info.name:
                            names[i] = inner
            self._graph.node.append(
                helper.make_node("Transpose", [inner], [info.name], name=f"{info.name}_nhwc", perm=_TO_NHWC)
            )
            _permute(info, _TO_NHWC)

    @staticmethod
    def _integer_maps(infos: object) -> list[onnx.ValueInfoProto]:
        kinds = [(info, info.type.tensor_type) for info in list(infos)]  # type: ignore[call-overload]
        return [info for info, kind in kinds if kind.elem_type == TensorProto.UINT8 and len(kind.shape.dim) == 4]


def _noted_range(node: onnx.NodeProto) -> float | None:
    return next((float(entry.value) for entry in node.metadata_props if entry.key == OUTPUT_RANGE), None)


def _permute(info: onnx.ValueInfoProto, order: list[int]) -> None:
    dims = [onnx.TensorShapeProto.Dimension.FromString(d.SerializeToString()) for d in info.type.tensor_type.shape.dim]
    del info.type.tensor_type.shape.dim[:]
    info.type.tensor_type.shape.dim.extend(dims[axis] for axis in order)

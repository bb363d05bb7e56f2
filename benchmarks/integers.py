"""INT8 parts in two forms that an engine of ONNX Runtime's CPU provider could have: integers throughout, or floats.

    python -m benchmarks.integers [--threads N]

The convolution of the image, of 3 x 3 pixels as in CIFAR's networks and of 7 x 7 as in ImageNet's, and the shortcut
without weights of a CIFAR network's first change of stage. Each is made here with random weights; its two engines are
compared with it when they are built, and run one image in alternating rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bdtool.specs import BATCH_AXIS, PartSpec, TensorSpec
from benchmarks.turns import rounds_of
from engines import image_convolution, integer_cpu
from engines.layouts import INTEGER_LAYOUT
from engines.onnxrt import OnnxRuntimeBackend

ROUNDS, SECONDS_A_ROUND = 15, 0.1
_Q_MAX = 127


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    backend = OnnxRuntimeBackend(threads=args.threads)
    print("| part | integers, us | floats, us | integers to floats |\n|---|---|---|---|")
    for name, part, model in (
        ("image, 3 x 3 pixels to 16 channels, 32 x 32", *stem(3, 16, size=32, stride=1)),
        ("image, 7 x 7 pixels to 64 channels, 224 x 224", *stem(7, 64, size=224, stride=2)),
        ("shortcut, 16 to 32 channels, 32 x 32", *shortcut(16, 32, size=32)),
    ):
        calls = [call_of(backend, part, model, in_floats=how) for how in (False, True)]
        rounds = rounds_of(calls, n_rounds=ROUNDS, seconds=SECONDS_A_ROUND)
        integers, floats = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {name} | {1e6 * integers:.1f} | {1e6 * floats:.1f} | {integers / floats:.2f} |", flush=True)


def stem(kernel: int, channels: int, *, size: int, stride: int) -> tuple[PartSpec, bytes]:
    """Return a Q/DQ part that convolves the image, with a ReLU."""
    image = TensorSpec(name="image", shape=(BATCH_AXIS, 3, size, size))
    y = TensorSpec(name="y", shape=(BATCH_AXIS, channels, size // stride, size // stride), dtype="int8")
    part = PartSpec(name="stem", kind="stem", reads=("image",), writes=("x",), inputs=(image,), outputs=(y,), flops=0)
    random = np.random.default_rng(0)
    weight = random.integers(-_Q_MAX, _Q_MAX + 1, size=(channels, 3, kernel, kernel)).astype(np.int8)
    constants = {
        "weight": weight,
        "weight_scale": np.full(channels, 1 / (_Q_MAX * kernel), np.float32),
        "weight_zero": np.zeros(channels, np.int8),
        "bias": random.normal(size=channels).astype(np.float32),
    }
    pads = [kernel // 2] * 4
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["integers"]),
        helper.make_node("DequantizeLinear", ["integers", "scale", "zero"], ["floats"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["weights"], axis=0),
        helper.make_node("Conv", ["floats", "weights", "bias"], ["convolved"], pads=pads, strides=[stride, stride]),
        helper.make_node("Relu", ["convolved"], ["rectified"]),
        helper.make_node("QuantizeLinear", ["rectified", "scale", "zero"], ["y"]),
    ]
    return part, model_of(part, nodes, constants)


def shortcut(n_in: int, n_out: int, *, size: int) -> tuple[PartSpec, bytes]:
    """Return a Q/DQ part that averages 2 x 2 pixels and adds channels of zeros."""
    x = TensorSpec(name="x", shape=(BATCH_AXIS, n_in, size, size), dtype="int8")
    y = TensorSpec(name="y", shape=(BATCH_AXIS, n_out, size // 2, size // 2), dtype="int8")
    part = PartSpec(
        name="shortcut_00", kind="shortcut", index=0, reads=("x",), writes=("x",), inputs=(x,), outputs=(y,), flops=0
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["floats"]),
        helper.make_node("AveragePool", ["floats"], ["averages"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Pad", ["averages", "pads"], ["padded"]),
        helper.make_node("QuantizeLinear", ["padded", "scale", "zero"], ["y"]),
    ]
    return part, model_of(part, nodes, {"pads": np.array([0, 0, 0, 0, 0, n_out - n_in, 0, 0])})


def model_of(part: PartSpec, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> bytes:
    constants = {"scale": np.float32(4 / _Q_MAX), "zero": np.int8(0), **constants}
    infos = [
        [helper.make_tensor_value_info(t.name, TensorProto.DataType.Value(t.dtype.upper().removesuffix("32")), t.shape)]
        for t in (*part.inputs, *part.outputs)
    ]
    initializers = [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, part.name, *infos, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def call_of(backend: OnnxRuntimeBackend, part: PartSpec, model: bytes, *, in_floats: bool) -> Callable[[], None]:
    """Build the part's engine in one of the two forms and bind it to buffers for one image."""
    shortcuts = (lambda model: None) if in_floats else integer_cpu.convolve_shortcuts
    with (
        mock.patch.object(image_convolution, "FEWER_VALUES", np.inf if in_floats else 0),
        mock.patch.object(integer_cpu, "convolve_shortcuts", shortcuts),
    ):
        built = backend.build(part, model, layout=INTEGER_LAYOUT)
    engine = backend.load(part, built.data, layout=built.layout)
    buffers = [{t.name: backend.allocate(t.shape_for(1), t.dtype)} for t in (*part.inputs, *part.outputs)]
    return engine.bind(*buffers)


if __name__ == "__main__":
    main()

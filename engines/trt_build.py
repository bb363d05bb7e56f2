"""ONNX part -> TensorRT engine, the same way for TensorRT 10, TensorRT 11 and TensorRT-RTX.

Activations between engines are channels-last: TensorRT's convolutions want them so, and with NCHW at its borders each
CIFAR block takes four kernels, two of which only move data, instead of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from bdtool.errors import EngineError
from bdtool.specs import PartSpec, TensorSpec
from engines.integer_cpu import is_quantized
from engines.layouts import CHANNELS_LAST
from engines.selections import convolve_shortcuts
from engines.timing_cache import TimingCache
from engines.trt_interrupts import cancelling
from engines.trt_library import TensorRTLibrary
from engines.trt_options import TensorRTOptions
from engines.trt_plan import Plan, plan_from_bytes
from engines.trt_turing import TURING, products_as_convolutions

_HARDWARE_COMPATIBILITY = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
_ONNX_NAMES = {TensorProto.FLOAT: "float", TensorProto.FLOAT16: "half", TensorProto.BFLOAT16: "bf16"}
# Formats of a rank-4 tensor that lies channels-last, by type: HWC is bound to float32, the others to narrower types
# and pad the channels to the number in their name.
_CHANNELS_LAST_FORMATS = {"float32": "HWC", "float16": "HWC8", "bfloat16": "HWC8", "int8": "HWC16"}
CHANNEL_BLOCK = 16
_INT8 = "int8"


@dataclass(frozen=True)
class Compiled:
    """A serialized engine, in which types its convolutions multiply ({"half": 2}), and its plan where that is text."""

    data: bytes
    convolutions: dict[str, int]
    plan: Plan | None


def compile_part(
    library: TensorRTLibrary,
    part: PartSpec,
    model: bytes,
    *,
    layout: str,
    options: TensorRTOptions,
    timing_cache: TimingCache | None = None,
) -> Compiled:
    """Compile one part.

    Args:
        layout: of the activations; `CHANNELS_LAST` or plain.
        timing_cache: what earlier parts learned, only for libraries that time kernels; this part's is added.

    Raises:
        EngineError: the library does not start or refuses the part (quoting it), or did not take the ONNX's types:
            in its network, or in the engine that it made of it.
    """
    trt = library.module
    model = _with_convolved_shortcuts(model)
    if TURING in options.sms:
        model = products_as_convolutions(model)
    failure = f"part {part.name!r}: {library.name} {trt.__version__} does not build it"
    with library.quoting(failure, EngineError) as interrupts:
        builder = trt.Builder(library.log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(library, network, part, model)
        convolutions = _obtained_precision(trt, network, part, model)
        _set_formats(trt, network, part, layout)
        config = _config(library, builder, part, options)
        monitor = cancelling(trt, interrupts)  # has to outlive the build
        config.progress_monitor = monitor
        with nullcontext() if timing_cache is None else timing_cache.applied(config):
            data = builder.build_serialized_network(network, config)
        if data is None:
            raise EngineError(f"part {part.name!r}: {library.name} builds no engine of it: {library.quoted()}")
        compiled = Compiled(bytes(data), convolutions, plan_from_bytes(bytes(data)))
        _check_plan(library, part, compiled, options)
        return compiled


def _with_convolved_shortcuts(model: bytes) -> bytes:
    """Return a part with its shortcuts without weights as convolutions, which saves two kernels each.

    A Q/DQ part stays: its averages are fused with the steps of its integers, and it would not have fewer kernels.
    """
    try:
        parsed = onnx.ModelProto.FromString(model)
    except DecodeError:
        return model  # the library's own parser says what is wrong
    if is_quantized(parsed):
        return model
    convolve_shortcuts(parsed)
    return bytes(parsed.SerializeToString())


def _parse(library: TensorRTLibrary, network: Any, part: PartSpec, model: bytes) -> None:
    parser = library.module.OnnxParser(network, library.log)
    if parser.parse(model):
        return
    reasons = [_reason(parser.get_error(i)) for i in range(parser.num_errors)]
    raise EngineError(
        f"part {part.name!r}: {library.name}'s ONNX parser refuses it: {'; '.join(reasons) or library.quoted()}"
    )


def _reason(error: Any) -> str:
    """Return the parser's words, with the node they are about where it names one."""
    if error.node_name() or error.node_operator():
        return f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}"
    return str(error.desc())


def _obtained_precision(trt: Any, network: Any, part: PartSpec, model: bytes) -> dict[str, int]:
    """Return the types that the network's convolutions multiply in, which a strongly typed network fixes.

    One whose operands are both dequantised has float tensors around it and runs in int8: the library fuses the
    dequantisation into it (TensorRT documentation, "Explicit Quantization").

    Raises:
        EngineError: they are not those that the ONNX model states.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    convolutions = [layer for layer in layers if layer.type == trt.LayerType.CONVOLUTION]
    dequantised = {layer.get_output(0).name for layer in layers if layer.type == trt.LayerType.DEQUANTIZE}
    obtained = Counter(
        _INT8 if _operands(layer) <= dequantised else layer.get_output(0).dtype.name.lower() for layer in convolutions
    )
    stated = Counter(_stated_types(model))
    if obtained != stated:
        raise EngineError(
            f"part {part.name!r}: its ONNX states {dict(stated)} convolutions, the parsed network has "
            f"{dict(obtained)}; report this with the version of the library"
        )
    return dict(obtained)


def _check_plan(library: TensorRTLibrary, part: PartSpec, compiled: Compiled, options: TensorRTOptions) -> None:
    """Raise EngineError where the engine multiplies convolutions in another type than its network states.

    For Turing TensorRT-RTX 1.7.1 dequantises both operands of an int8 convolution and multiplies in float, and does so
    for every target of an engine that has Turing among them. Convolutions that became another kind of kernel are no
    reason: only as many count as there are too many of another type.
    """
    if compiled.plan is None:
        return
    stated, made = Counter(compiled.convolutions), Counter(compiled.plan.convolutions)
    lost, instead = stated - made, made - stated
    if not (lost and instead):
        return
    targets = ", ".join(compiled.plan.architectures)
    others = [str(sm) for sm in options.sms if sm != TURING]
    if TURING not in options.sms:
        advice = "take another --precision, and report this"
    elif others:
        advice = f"build with --sm {','.join(others)}, and for {TURING} apart, with --precision fp16"
    else:
        advice = "build with --precision fp16"
    raise EngineError(
        f"part {part.name!r}: its ONNX states {dict(lost)} convolutions; for {targets} {library.name} "
        f"{library.module.__version__} computes {dict(instead)} instead, which saves no time: {advice}"
    )


def _operands(convolution: Any) -> set[str | None]:
    """Return the names of the tensors that it multiplies; None stands for weights that are its own."""
    image = convolution.get_input(0).name
    weight = convolution.get_input(1) if convolution.num_inputs > 1 else None
    return {image, None if weight is None else weight.name}


def _stated_types(model: bytes) -> Iterator[str]:
    """Yield for each Conv the type it multiplies in: that of its weight, or int8 where both operands are dequantised.

    With only the weight dequantised it is that of the scale.
    """
    graph = onnx.ModelProto.FromString(model).graph
    types = {weight.name: weight.data_type for weight in graph.initializer}
    scales = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        image, weight = node.input[:2]
        if image in scales and weight in scales:
            yield _INT8
        else:
            dtype = types.get(scales.get(weight, weight), TensorProto.UNDEFINED)
            yield _ONNX_NAMES.get(dtype, TensorProto.DataType.Name(dtype).lower())


def _set_formats(trt: Any, network: Any, part: PartSpec, layout: str) -> None:
    """Fix the memory format of every input and output; those of the part's spec must be there by name."""
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    for found, activations, tensors in ((inputs, part.reads, part.inputs), (outputs, part.writes, part.outputs)):
        if set(found) != {tensor.name for tensor in tensors}:
            raise EngineError(
                f"part {part.name!r}: its ONNX has tensors {', '.join(found)}, the bundle says "
                f"{', '.join(tensor.name for tensor in tensors)}; export the model again"
            )
        for activation, tensor in zip(activations, tensors, strict=True):
            format_name = _format(activation, tensor, layout)
            found[tensor.name].allowed_formats = 1 << int(getattr(trt.TensorFormat, format_name))


def _format(activation: str, tensor: TensorSpec, layout: str) -> str:
    if activation != "x" or len(tensor.shape) != 4 or layout != CHANNELS_LAST:
        return "LINEAR"
    if tensor.dtype not in _CHANNELS_LAST_FORMATS:
        raise EngineError(
            f"tensor {tensor.name!r} is {tensor.dtype}; TensorRT engines pass on {', '.join(_CHANNELS_LAST_FORMATS)}"
        )
    return _CHANNELS_LAST_FORMATS[tensor.dtype]


def _config(library: TensorRTLibrary, builder: Any, part: PartSpec, options: TensorRTOptions) -> Any:
    trt, config = library.module, builder.create_builder_config()
    _set_flag(trt, config, "TF32", options.tf32)  # on by default
    _set_flag(trt, config, "VERSION_COMPATIBLE", options.version_compatible)
    _set_flag(trt, config, "STRIP_PLAN", options.strip_weights)
    _set_flag(trt, config, "REFIT", options.refit)
    if library.is_rtx:
        # with it no enqueue allocates, which a CUDA graph would hold as allocation nodes; but with a dynamic batch the
        # first enqueue of TensorRT-RTX 1.7.1 wrote the batch to no address and ended the process (on a stand-in driver)
        _set_flag(trt, config, "REQUIRE_USER_ALLOCATION", options.min_batch == options.max_batch)
        _set_targets(library, config, options.sms)
    elif options.hardware_compatibility != "none":
        level = _HARDWARE_COMPATIBILITY[options.hardware_compatibility]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    config.max_aux_streams = 0  # one stream an engine, as capturing it in a CUDA graph wants it
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector; contexts are told to say less
    _add_profile(builder, config, part, options)
    return config


def _set_flag(trt: Any, config: Any, name: str, wanted: bool) -> None:
    flag = getattr(trt.BuilderFlag, name)
    config.set_flag(flag) if wanted else config.clear_flag(flag)


def _set_targets(library: TensorRTLibrary, config: Any, sms: tuple[int, ...]) -> None:
    targets = sorted(set(sms))
    config.num_compute_capabilities = len(targets)
    for index, sm in enumerate(targets):
        config.set_compute_capability(getattr(library.module.ComputeCapability, f"SM{sm}"), index)


def _add_profile(builder: Any, config: Any, part: PartSpec, options: TensorRTOptions) -> None:
    profile = builder.create_optimization_profile()
    batches = (options.min_batch, options.opt_batch, options.max_batch)
    for tensor in part.inputs:
        profile.set_shape(tensor.name, *(tensor.shape_for(n) for n in batches))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"part {part.name!r}: the optimization profile for batch {batches} was refused")

"""ONNX Runtime: the embedded default on the CPU, and its CUDA and TensorRT providers where there is a GPU.

On the CPU an engine is the part's model as ONNX Runtime's optimiser leaves it, stored so that loading it takes no
optimising, with activations in the provider's own layout (`engines.native_layout`). On a GPU it is the ONNX part.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache, partial

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from bdtool.errors import BackendError, EngineError
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import (
    ENGINE_TOLERANCE,
    PLAIN_LAYOUT,
    Buffer,
    BuiltEngine,
    Call,
    Engine,
    JoinedEngine,
    LayoutError,
    PartEngine,
)
from engines.blocked_nodes import stay_blocked
from engines.check import N_PROBES, check_engine
from engines.cpu import has_vnni
from engines.image_convolution import convolve_image_in_floats
from engines.integer_cpu import is_quantized, lower_quantized
from engines.layouts import INTEGER_LAYOUT, block_size, feature_maps, pack, unpack
from engines.native_layout import add_guards, cut_guards
from engines.onnxrt_buffers import DeviceRows, HostBuffer, OrtDeviceBuffer, ort_value
from engines.onnxrt_providers import (
    CPU,
    DISABLED_OPTIMIZERS,
    CpuProvider,
    CudaProvider,
    Provider,
    cuda_providers,
    open_session,
    probe_part,
    require_provider,
    tensorrt_provider,
)
from engines.shared_weights import SharedWeights, aligned
from engines.trt_options import TensorRTOptions
from export.check import OnnxReference, compare
from export.compose import compose_parts
from export.fused import fuse_parts
from export.ort_threads import any_threads_options, checked_threads, shared_threads_options


class OnnxRuntimeBackend:
    """ONNX Runtime on "cpu" or "cuda:N"; many engines share one thread pool.

    Args:
        tensorrt: on "cuda:N", let the TensorRT provider compile engines of this profile; None takes the CUDA provider.
    """

    def __init__(
        self, *, device: str = "cpu", threads: int | None = None, tensorrt: TensorRTOptions | None = None
    ) -> None:
        self.device = device
        self.threads = checked_threads(threads)
        self._options = shared_threads_options(self.threads)
        self._weights = SharedWeights()  # of joined engines
        self._rows = DeviceRows(lambda model: open_session(model, self._options, cuda_providers(device)))
        if device == "cpu":
            self._provider: Provider = CpuProvider()
            self._options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # done at build
        else:
            self._provider = CudaProvider(device) if tensorrt is None else tensorrt_provider(device, tensorrt)
            self._options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            # it turns the biases of integer parts into int32, which only the CPU provider dequantises
            self._options.add_session_config_entry(DISABLED_OPTIMIZERS, "WeightBiasQuantization")
            require_provider(device, self._provider)
        self.plans_by_batch = self._provider.plans_by_batch
        self._n_probes = N_PROBES if tensorrt is None else tensorrt.nearest_batch(N_PROBES)

    def activation_layout(self, network: NetworkSpec) -> str:
        tensors = [t for part in network.parts for t in feature_maps(part)]
        dtypes = {tensor.dtype for tensor in tensors}
        if self.device == "cpu" and dtypes == {"int8"}:
            return INTEGER_LAYOUT
        layout = _native_layout() if self.device == "cpu" and dtypes == {"float32"} else PLAIN_LAYOUT
        fits = all(isinstance(t.shape[1], int) and t.shape[1] % block_size(layout) == 0 for t in tensors)
        return layout if fits else PLAIN_LAYOUT

    def build(self, part: PartSpec, model: bytes, *, layout: str) -> BuiltEngine:
        if "bfloat16" in {tensor.dtype for tensor in (*part.inputs, *part.outputs)}:
            reason = "CPU provider has no bfloat16 kernels" if self.device == "cpu" else "Python API has no bfloat16"
            raise EngineError(
                f"part {part.name!r}: ONNX Runtime's {reason}; "
                "build bf16 for a GPU (--backend tensorrt), or use --precision fp16 here"
            )
        gpu = self.device != "cpu"
        data = self._provider.engine_from_onnx(model) if gpu else _optimise(part, model, layout)
        failure = EngineError if layout in (PLAIN_LAYOUT, INTEGER_LAYOUT) else LayoutError
        engine = self.load(part, data, layout=layout)
        error = check_engine(part, model, engine, n_images=self._n_probes, failure=failure)
        return BuiltEngine(data=data, layout=layout, error=error)

    def load(self, part: PartSpec, data: bytes, *, layout: str) -> Engine:
        return self._open(part, data, self._options, layout)

    def join(self, joined: PartSpec, pieces: Sequence[tuple[PartSpec, bytes]]) -> JoinedEngine:
        if self.device != "cpu":  # each has weights of its own on the device
            data = compose_parts(joined.name, pieces, check=False)  # of engines that were checked when they were built
            engine = self._open(joined, data, self._options, PLAIN_LAYOUT)
            return JoinedEngine(engine=engine, own_bytes=len(data))
        graph = self._weights.join(joined.name, pieces)
        engine = self._open(joined, graph.model, self._weights.options(graph, self.threads), PLAIN_LAYOUT)
        return JoinedEngine(engine=engine, own_bytes=graph.own_bytes, shared_bytes=graph.added_bytes)

    def fuse(self, network: NetworkSpec, pieces: Mapping[str, bytes]) -> bytes:
        return fuse_parts(network, pieces, check=False)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        if self.device == "cpu":
            return HostBuffer(aligned(np.zeros(shape, dtype)))
        return OrtDeviceBuffer(shape, dtype, self.device, self._rows)

    def _open(self, part: PartSpec, data: bytes, options: ort.SessionOptions, layout: str) -> Engine:
        try:
            session = open_session(data, options, self._provider.listed(part, data))
        except Exception as exc:  # onnxruntime raises classes of its own for each status
            raise EngineError(
                f"part {part.name!r}: ONNX Runtime cannot load its engine ({exc}); build it again"
            ) from exc
        session._model_bytes = None  # kept for a second try with other providers, which we do not want
        wanted = self._provider.name
        if session.get_providers()[0] != wanted:
            raise BackendError(f"part {part.name!r}: asked for {wanted}, ONNX Runtime chose {session.get_providers()}")
        return OnnxRuntimeEngine(part, session, layout, options)


class OnnxRuntimeEngine(PartEngine):
    """One part in an ONNX Runtime session."""

    def __init__(self, part: PartSpec, session: ort.InferenceSession, layout: str, options: ort.SessionOptions) -> None:
        super().__init__(part)
        self._options = options  # hold the shared weights, which ONNX Runtime does not own
        self._session = session
        self._names = [tensor.name for tensor in part.outputs]
        self._integer = {t.name for t in feature_maps(part)} if layout == INTEGER_LAYOUT else set()
        self.layout = layout

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: _channels_last(values) if name in self._integer else values for name, values in feeds.items()}
        try:
            results = dict(zip(self._names, self._session.run(self._names, given), strict=True))
        except Exception as exc:
            raise self._error(exc) from exc
        return {name: _as_declared(values) if name in self._integer else values for name, values in results.items()}

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        binding = self._session.io_binding()
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, self._value(name, buffer))
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, self._value(name, buffer))
        # The C++ method itself: the Python wrapper costs microseconds a call, and a RunOptions object even more.
        run, raw = self._session._sess.run_with_iobinding, binding._iobinding

        def call() -> None:
            try:
                run(raw, None)
            except Exception as exc:
                raise self._error(exc) from exc

        call.keep_alive = (binding, inputs, outputs)  # type: ignore[attr-defined]  # `raw` does not own them
        return call

    def _value(self, name: str, buffer: Buffer) -> ort.OrtValue:
        """Return the buffer's memory as ONNX Runtime is to see it; it belongs to the buffer."""
        if name not in self._integer:
            return ort_value(buffer)
        return ort.OrtValue.ortvalue_from_numpy(_channels_last(buffer.read()))

    def _error(self, exc: Exception) -> EngineError:
        return EngineError(f"part {self._part.name!r}: ONNX Runtime failed to run it: {exc}")


def _channels_last(values: np.ndarray) -> np.ndarray:
    """Return the memory of int8 [N, C, H, W], which holds uint8 channels last, under that shape and dtype."""
    n, c, h, w = values.shape
    return values.view(np.uint8).reshape(n, h, w, c)


def _as_declared(values: np.ndarray) -> np.ndarray:
    """Undo `_channels_last`."""
    n, h, w, c = values.shape
    return values.view(np.int8).reshape(n, c, h, w)


def _optimise(part: PartSpec, model: bytes, layout: str) -> bytes:
    """Return the model as ONNX Runtime's optimiser leaves it, its activations in `layout`."""
    prepared = _parsed(part, model)
    if is_quantized(prepared):
        lower_quantized(prepared, unsigned_weights=not has_vnni())
    elif layout != PLAIN_LAYOUT:
        stay_blocked(prepared)
    if layout in (PLAIN_LAYOUT, INTEGER_LAYOUT):
        file = _optimised_file(part, prepared.SerializeToString())
        return _with_image_in_floats(part, file) if is_quantized(prepared) else file
    add_guards(prepared, part)
    optimised = onnx.ModelProto.FromString(_optimised_file(part, prepared.SerializeToString()))
    cut_guards(optimised, part)
    data: bytes = optimised.SerializeToString(deterministic=True)
    return data


def _with_image_in_floats(part: PartSpec, file: bytes) -> bytes:
    if _native_layout() == PLAIN_LAYOUT:  # the kernels that are faster are those of blocked layouts
        return file
    model = onnx.ModelProto.FromString(file)
    convolve_image_in_floats(model, optimise=partial(_optimised_file, part))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _parsed(part: PartSpec, model: bytes) -> onnx.ModelProto:
    try:
        parsed: onnx.ModelProto = onnx.ModelProto.FromString(model)
    except DecodeError as exc:
        raise EngineError(f"part {part.name!r}: ONNX Runtime refuses its model: it is no ONNX file ({exc})") from exc
    return parsed


def _optimised_file(part: PartSpec, model: bytes) -> bytes:
    options = any_threads_options()
    # ONNX Runtime gives the model to a file alone, and does not say why it cannot write one, a full disk for instance
    with open(os.memfd_create("bdtool-optimised"), "rb") as file:
        options.optimized_model_filepath = f"/proc/self/fd/{file.fileno()}"
        try:
            ort.InferenceSession(model, options, providers=[CPU])
        except Exception as exc:
            raise EngineError(f"part {part.name!r}: ONNX Runtime refuses its model: {exc}") from exc
        return file.read()


@cache
def _native_layout() -> str:
    """Return the layout of this processor's convolution kernels, found by trying."""
    part, model = probe_part()
    reference = OnnxReference(model)
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 64, 8, 8)).astype(np.float32)}
    expected = reference.run(feeds)["y"]
    try:
        data = _optimise(part, model, "NCHW16c")  # cutting the guards is the same for every block size
    except LayoutError:
        return PLAIN_LAYOUT  # a processor without NCHWc kernels
    session = ort.InferenceSession(data, any_threads_options(), providers=[CPU])
    for layout in ("NCHW16c", "NCHW8c", "NCHW4c"):
        actual = unpack(session.run(None, {"x": pack(feeds["x"], layout)})[0], layout)
        if compare(expected, actual, tolerance=ENGINE_TOLERANCE).ok:
            return layout
    return PLAIN_LAYOUT

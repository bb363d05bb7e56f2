"""ONNX Runtime's execution providers: what a session of each engine is asked for, and whether it can be had here.

The TensorRT provider compiles a part when its session is made, and keeps the result in files. It names them after the
graph, whose weights do not count: two blocks of one shape would take each other's engines. So the name begins with
the digest of the whole engine file: weights, types and optimization profile. Tested against a stand-in for the
session: not yet run on a GPU.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from bdtool.errors import BackendError
from bdtool.specs import BATCH_AXIS, PartSpec, TensorSpec
from engines.gpu_cache import gpu_cache_directory, mark_used, prune
from engines.libcuda import Driver, driver_from_libcuda
from engines.trt_options import ONNXRUNTIME_TENSORRT, TensorRTOptions
from export.files import sha256_of_bytes
from export.onnx_precision import convolves_in_half, precision_of
from export.ort_threads import any_threads_options

logger = logging.getLogger(__name__)

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
DISABLED_OPTIMIZERS = "optimization.disable_specified_optimizers"  # a session's setting: their names
TENSORRT_INSTALL = 'pip install "tensorrt>=10.13,<11"'  # the provider is linked with libnvinfer.so.10
_FIRST_ON_CUDA_13 = "1.27"  # which a driver of CUDA 12 does not load
MAX_CACHE_BYTES = 4 * 2**30  # of all bundles, GPUs and versions; a ResNet-101's FP32 weights are 0.17 GiB
_BATCHES, _LEVEL = "bdtool.batches", "bdtool.optimization_level"  # keys of an engine file's metadata
_PRECISION_FLAGS = {"fp16": "trt_fp16_enable", "bf16": "trt_bf16_enable", "int8": "trt_int8_enable"}
_ON = "True"  # in Python the provider's flags are "True" and "False"; "1", as in C++, is refused
FATAL_ONLY, _ERRORS_ONLY, _ORT_DEFAULT = 4, 3, 2  # ONNX Runtime's log severities; its own default shows warnings


class Provider(Protocol):
    """A provider on one device, and those that take the nodes it refuses."""

    @property
    def name(self) -> str:
        """The provider that must come first in each session."""

    @property
    def plans_by_batch(self) -> bool:
        """See `engines.base.Backend`."""

    def engine_from_onnx(self, model: bytes) -> bytes:
        """Return the engine file for a part that no optimiser went over: the model, with what the provider must know.

        Joined with others, the file keeps what the first of them says.
        """

    def listed(self, part: PartSpec, engine: bytes) -> list[Any]:
        """Return the providers of a session for an engine file, with their options, the preferred one first."""


class CpuProvider:
    """The CPU provider."""

    name = CPU
    plans_by_batch = False

    def engine_from_onnx(self, model: bytes) -> bytes:
        return model

    def listed(self, part: PartSpec, engine: bytes) -> list[Any]:
        return [CPU]


class CudaProvider:
    """The CUDA provider on "cuda:N". FP32 means FP32: by default it would let convolutions use TF32."""

    name = CUDA
    # a convolution keeps the plan of its last shape alone (`Conv::UpdateState`, core/providers/cuda/nn/conv.cc)
    plans_by_batch = True

    def __init__(self, device: str) -> None:
        self._device = device

    def engine_from_onnx(self, model: bytes) -> bytes:
        return model

    def listed(self, part: PartSpec, engine: bytes) -> list[Any]:
        # without TF32 a convolution takes no tensor core at all, whatever its type (`CreateCudnnFeExecutionPlan`)
        half = convolves_in_half(onnx.ModelProto.FromString(engine))
        return cuda_providers(self._device, **({} if half else {"use_tf32": "0"}))


class TensorRTProvider(CudaProvider):
    """The TensorRT provider on "cuda:N"; nodes that TensorRT refuses go to the CUDA provider.

    Args:
        options: the optimization profile and the builder's level; the provider has no other of the options.
        cache: the directory for compiled engines and the timing cache, made when needed.
    """

    name = TENSORRT
    plans_by_batch = False

    def __init__(self, device: str, options: TensorRTOptions, *, cache: Path) -> None:
        super().__init__(device)
        self._options = options
        self._cache = cache

    def engine_from_onnx(self, model: bytes) -> bytes:
        """Return the model with profile and level in its metadata, so that it runs as it was built."""
        proto = onnx.ModelProto.FromString(model)
        options = self._options
        entries = {_BATCHES: f"{options.min_batch},{options.opt_batch},{options.max_batch}"}
        if options.optimization_level is not None:
            entries[_LEVEL] = str(options.optimization_level)
        helper.set_model_props(proto, entries)
        data: bytes = proto.SerializeToString(deterministic=True)
        return data

    def listed(self, part: PartSpec, engine: bytes) -> list[Any]:
        proto = onnx.ModelProto.FromString(engine)
        built = {entry.key: entry.value for entry in proto.metadata_props}
        options = {"device_id": device_index(self._device), "trt_auxiliary_streams": "0"}
        options |= _profile(part, built[_BATCHES])
        if _LEVEL in built:
            options["trt_builder_optimization_level"] = built[_LEVEL]
        precision = precision_of(proto)
        if precision in _PRECISION_FLAGS:  # lets TensorRT take the types that the part has; fp32 parts stay fp32
            options[_PRECISION_FLAGS[precision]] = _ON
        return [(TENSORRT, options | self._caches(sha256_of_bytes(engine))), *super().listed(part, engine)]

    def _caches(self, digest: str) -> dict[str, str]:
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            logger.warning("%s cannot be made (%s): TensorRT compiles its engines again", self._cache, exc.strerror)
            return {}
        mark_used(self._cache, digest)
        return {
            "trt_engine_cache_enable": _ON,
            "trt_engine_cache_path": str(self._cache),
            "trt_engine_cache_prefix": digest,
            "trt_timing_cache_enable": _ON,
            "trt_timing_cache_path": str(self._cache),
        }


def cuda_providers(device: str, **options: str) -> list[Any]:
    """Return the providers of a session that the CUDA provider runs on "cuda:N"."""
    return [(CUDA, {"device_id": device_index(device), **options})]


def device_index(device: str) -> str:
    """Return the N of "cuda:N", as providers take it."""
    return device.partition(":")[2]


def tensorrt_provider(device: str, options: TensorRTOptions) -> TensorRTProvider:
    """Return the TensorRT provider with the cache of that GPU, once what all such caches hold is within its bound.

    Raises:
        BackendError: no driver, or no such GPU.
    """
    driver, index = driver_from_libcuda(), int(device_index(device))
    if not driver.usable or index >= len(driver.gpus):
        there = driver.error or f"the driver lists {len(driver.gpus)} GPU(s), cuda:0 is the first"
        raise BackendError(f"backend {ONNXRUNTIME_TENSORRT!r}, device {device!r}: {there}. See `bdtool doctor`")
    cache = gpu_cache_directory(
        "engines",
        gpu=driver.gpus[index].name,
        cuda_version=driver.cuda_text,
        library=f"onnxruntime{ort.__version__}",
    )
    prune(cache.parent, max_bytes=MAX_CACHE_BYTES)
    return TensorRTProvider(device, options, cache=cache)


def require_provider(device: str, provider: Provider) -> None:
    """Raise BackendError unless a session can really be made on the device with this provider.

    The TensorRT provider has no option for TF32: the first time that it is asked for, TF32 is switched off for TensorRT
    and CUDA libraries of the process, unless `NVIDIA_TF32_OVERRIDE` is set.
    """
    title = {CUDA: "CUDA", TENSORRT: "TensorRT"}[provider.name]
    if provider.name not in ort.get_available_providers():
        raise BackendError(
            f"device {device!r}: this onnxruntime has no {title} provider "
            f"(it has {', '.join(ort.get_available_providers())}); "
            "install it with: pip uninstall onnxruntime; pip install onnxruntime-gpu"
        )
    driver = driver_from_libcuda()
    if error := driver.error:  # of which the provider would speak in riddles
        raise BackendError(f"device {device!r}: {error}. See `bdtool doctor`, or use --device cpu")
    if provider.name == TENSORRT:
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # read when its libraries load
    load_libraries(tensorrt=provider.name == TENSORRT)
    part, model = probe_part()
    options = any_threads_options()
    options.log_severity_level = FATAL_ONLY  # the reason goes into our error
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    engine = provider.engine_from_onnx(model)
    advice = f"it may lack libraries: {cuda_install(driver)}"
    if provider.name == TENSORRT:
        advice += f"; it needs TensorRT 10: {TENSORRT_INSTALL}"
    try:
        session = open_session(engine, options, provider.listed(part, engine), severity=FATAL_ONLY)
    except Exception as exc:
        raise BackendError(
            f"device {device!r}: the {title} provider cannot start ({str(exc).strip().splitlines()[0]}); "
            f"see `bdtool doctor`; {advice}"
        ) from exc
    if session.get_providers()[0] != provider.name:
        raise BackendError(
            f"device {device!r}: asked for {provider.name}, ONNX Runtime fell back to {session.get_providers()[0]}; "
            f"see `bdtool doctor`; {advice}"
        )


def cuda_install(driver: Driver) -> str:
    """Return the command that installs ONNX Runtime with what its CUDA provider is linked with.

    The extras bring libcurand, which PyTorch does not.
    """
    below = f",<{_FIRST_ON_CUDA_13}" if driver.usable and driver.cuda_version < (13, 0) else ""
    return f'pip install "onnxruntime-gpu[cuda,cudnn]>=1.25{below}"'


def open_session(
    data: bytes, options: ort.SessionOptions, providers: list[Any], *, severity: int = _ERRORS_ONLY
) -> ort.InferenceSession:
    """Return a session on these providers; it never tries others, neither now nor when a call fails.

    Args:
        severity: from which on the process's log, beside the session's own, says what a provider on a GPU meets as it
            loads. From 1.26 on a warning there greets each such session ("No registered plugin EP device found").
    """
    with nullcontext() if providers == [CPU] else _process_log(severity):
        return ort.InferenceSession(data, options, providers=providers, enable_fallback=0)


@contextmanager
def _process_log(severity: int) -> Iterator[None]:
    """Let the log that ONNX Runtime keeps for the process begin at another severity than its default."""
    ort.set_default_logger_severity(severity)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_ORT_DEFAULT)


def load_libraries(*, tensorrt: bool) -> None:
    """Load the libraries that pip installed; without that the loader looks in the system's directories only."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # what is not there it prints; the probe's error says it, too
            ort.preload_dlls()
    if not tensorrt:
        return
    try:
        importlib.import_module("tensorrt_libs")
    except (ImportError, OSError) as exc:  # what the system has may still do
        logger.debug("tensorrt_libs is not loaded: %s", exc)


def _profile(part: PartSpec, batches: str) -> dict[str, str]:
    """Return the optimization profile: for each input its shape at the smallest, the usual and the largest batch."""
    numbers = zip(("min", "opt", "max"), map(int, batches.split(",")), strict=True)
    return {
        f"trt_profile_{which}_shapes": ",".join(f"{t.name}:{'x'.join(map(str, t.shape_for(n)))}" for t in part.inputs)
        for which, n in numbers
    }


def probe_part() -> tuple[PartSpec, bytes]:
    """Return a part with one convolution and its ONNX model, to try things on."""
    shape = (BATCH_AXIS, 64, 8, 8)
    x, y = TensorSpec(name="x", shape=shape), TensorSpec(name="y", shape=shape)
    part = PartSpec(
        name="probe", kind="block", index=0, reads=("x",), writes=("x",), inputs=(x,), outputs=(y,), flops=0
    )
    weight = np.random.default_rng(1).normal(size=(64, 64, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return part, model.SerializeToString()

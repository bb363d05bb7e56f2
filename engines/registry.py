"""The backends by name. Only the one asked for is imported, and only when something has to be built or run."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

from bdtool.errors import BackendError, UsageError
from engines.base import Backend, BackendIdentity
from engines.cpu import instruction_set
from engines.graph_modes import AUTO, OFF, GraphPlan, graphs_of_machine, plan_for
from engines.libcuda import driver_from_libcuda
from engines.trt_identity import tensorrt_identity
from engines.trt_options import (
    ONNXRUNTIME_TENSORRT,
    PROFILED,
    TENSORRT,
    TENSORRT_RTX,
    TensorRTOptions,
    default_max_batch,
)
from export.manifest import EXPORTED
from export.packages import installed_version

logger = logging.getLogger(__name__)

BACKENDS = ("onnxruntime", "torch", TENSORRT, TENSORRT_RTX, ONNXRUNTIME_TENSORRT, "fake")
_CAPTURED = ("torch", TENSORRT, TENSORRT_RTX)  # whose work can become part of a CUDA graph
# How ONNX Runtime's engines are made from parts (`native_layout`, `blocked_nodes`, `selections`, `integer_cpu`,
# `image_convolution`); raised when that changes, so that engines made before are built again.
_ONNXRUNTIME_RECIPE = "recipe 2"
_DEVICE = re.compile(r"cpu|cuda:[0-9]+")


def identify_backend(name: str, device: str, *, tensorrt: TensorRTOptions | None = None) -> BackendIdentity:
    """Return what engines of this backend on this device are made for, without importing its library.

    Args:
        tensorrt: what a backend on TensorRT is to build, and for which targets; None takes its defaults.

    Raises:
        UsageError: no such backend, a device that is neither "cpu" nor "cuda:N", or options that do not fit.
        BackendError: its package is not installed, or it needs a GPU and there is none.
    """
    _check(name, device, tensorrt)
    if name in (TENSORRT, TENSORRT_RTX):
        return tensorrt_identity(name, device, tensorrt, driver_from_libcuda())[0]
    if name == "fake":
        return BackendIdentity(name=name, version="1", target=_file_name(device), suffix=".json")
    if name == "torch":
        return BackendIdentity(
            name=name,
            version=_torch_version(),
            target=_file_name(device),
            suffix=".onnx",
            converts_fp16=True,
            takes_pixels=device != "cpu",
        )
    target = f"cpu-{instruction_set()}" if device == "cpu" else _file_name(device)
    identity = BackendIdentity(
        name=name, version=_onnxruntime_version(), target=target, suffix=".onnx", takes_pixels=device != "cpu"
    )
    if name != ONNXRUNTIME_TENSORRT:
        return replace(identity, settings=_ONNXRUNTIME_RECIPE)
    return replace(identity, converts_fp16=True, settings=None if tensorrt is None else tensorrt.settings)


def require_backend(name: str) -> None:
    """Raise UsageError where there is no such backend."""
    if name not in BACKENDS:
        known = ", ".join(backend for backend in BACKENDS if backend != "fake")
        raise UsageError(f"unknown backend {name!r}; this version has {known}")


def joins(name: str) -> bool:
    """Say whether the backend makes one engine of several, which strategy `path` needs."""
    return name in ("onnxruntime", ONNXRUNTIME_TENSORRT, "torch", "fake")


def fuses(name: str) -> bool:
    """Say whether the backend has conditionals inside an engine, which strategy `fused` needs."""
    return name == "onnxruntime"


def captures(name: str, device: str) -> bool:
    """Say whether engines of this backend on this device can be captured in CUDA graphs, given driver and packages."""
    return name in _CAPTURED and device != "cpu"


def plan_graphs(name: str, device: str, mode: str = AUTO) -> GraphPlan | None:
    """Return which CUDA graphs this backend may use on this device, here; None where it never uses any.

    Args:
        mode: "auto" for all that are there, or one of them; see `engines.graph_modes`.

    Raises:
        UsageError: no such mode, or a graph where the backend's work is never part of one.
        BackendError: no usable GPU, or that mode is not to be had: an old driver, or a package is missing.
    """
    if not captures(name, device):
        if mode in (AUTO, OFF):
            return None
        raise UsageError(f"CUDA graph mode {mode!r} {_runs_elsewhere(name, device)}")
    driver = driver_from_libcuda()
    if not driver.usable:
        raise BackendError(f"device {device!r}: {driver.error or 'no GPU'}. See `bdtool doctor`")
    return plan_for(mode, graphs_of_machine(driver, installed_version))


def require_graphs(name: str, device: str) -> None:
    """Raise unless strategy `graph` is to be had: on a GPU, by a backend whose engines can be captured.

    Raises:
        UsageError: another backend, or not on a GPU.
        BackendError: no usable GPU.
    """
    if plan_graphs(name, device) is None:
        raise UsageError(f"strategy 'graph' {_runs_elsewhere(name, device)}")


def _runs_elsewhere(name: str, device: str) -> str:
    return f"runs on --backend {', '.join(_CAPTURED)} with --device cuda:N; got backend {name!r} on device {device!r}"


def batch_options(name: str, max_batch: int, *, precision: str = EXPORTED) -> TensorRTOptions | None:
    """Return build options for batches up to `max_batch`; None for a backend whose engines take any batch."""
    if name not in PROFILED:
        return None
    return TensorRTOptions(max_batch=default_max_batch(name, precision, max_batch))


def open_backend(
    name: str, device: str, *, threads: int | None = None, tensorrt: TensorRTOptions | None = None
) -> Backend:
    """Return the backend `name` on `device` ("cpu" or "cuda:N").

    Args:
        threads: CPU threads for one engine call; None takes what `export.ort_threads.default_threads` says.
        tensorrt: as for `identify_backend`.

    Raises:
        UsageError: no such backend, a device that is neither "cpu" nor "cuda:N", or no number of threads.
        BackendError: the library, the device or that number of threads is not to be had in this process.
    """
    _check(name, device, tensorrt)
    if name in (TENSORRT, TENSORRT_RTX):
        from engines.trt import open_tensorrt

        identity, options = tensorrt_identity(name, device, tensorrt, driver_from_libcuda())
        return open_tensorrt(identity, device, options)
    if name == "fake":
        from engines.fake import FakeBackend

        logger.warning("backend 'fake' makes its answers up: it is for tests")
        return FakeBackend()
    if name == "torch":
        from engines.torchrt import TorchBackend

        return TorchBackend(device=device, threads=threads)
    from engines.onnxrt import OnnxRuntimeBackend

    if name == ONNXRUNTIME_TENSORRT:
        return OnnxRuntimeBackend(device=device, threads=threads, tensorrt=tensorrt or TensorRTOptions())
    return OnnxRuntimeBackend(device=device, threads=threads)


def _check(name: str, device: str, tensorrt: TensorRTOptions | None) -> None:
    require_backend(name)
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise UsageError(f"unknown device {device!r}; expected cpu or cuda:N, for instance cuda:0")
    if tensorrt is not None and name not in PROFILED:
        raise UsageError(f"backend {name!r} has no TensorRT options; give --backend {TENSORRT} or {TENSORRT_RTX}")
    if name == ONNXRUNTIME_TENSORRT:
        (tensorrt or TensorRTOptions()).check_for(name)
        if device == "cpu":
            raise UsageError(f"backend {name!r} runs its engines on a GPU: give --device cuda:0")


def _file_name(device: str) -> str:
    return device.replace(":", "")


def _torch_version() -> str:
    if (version := installed_version("torch")) is None:
        raise BackendError("torch is not installed; add it with: pip install torch")
    return version.partition("+")[0]  # "+cu130" is no version of what it computes


def _onnxruntime_version() -> str:
    for distribution in ("onnxruntime-gpu", "onnxruntime"):
        if (version := installed_version(distribution)) is not None:
            return version
    raise BackendError("onnxruntime is not installed; add it with: pip install onnxruntime-gpu")

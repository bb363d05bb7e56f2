"""The backends `tensorrt` and `tensorrt-rtx`: engines from ONNX parts, and on a GPU their execution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

from bdtool.errors import BackendError, EngineError
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import PLAIN_LAYOUT, BackendIdentity, Buffer, BuiltEngine, Engine, JoinedEngine
from engines.capture import Capturer
from engines.check import N_PROBES, check_engine
from engines.cuda_buffer import DeviceBuffer, concatenate
from engines.cuda_device import CudaDevice, open_device
from engines.device_array import DeviceArray
from engines.device_timer import DeviceTimer
from engines.gpu_cache import gpu_cache_path
from engines.layouts import CHANNELS_LAST, feature_maps
from engines.libcuda import Driver, Gpu, driver_from_libcuda
from engines.rtx_cache import RuntimeCache
from engines.timing_cache import TimingCache
from engines.trt_build import CHANNEL_BLOCK, compile_part
from engines.trt_library import TensorRTLibrary, load_library
from engines.trt_options import TensorRTOptions
from engines.trt_runtime import TensorRTCapturer, TensorRTRuntime


class TensorRTBackend:
    """Builds engines with TensorRT 10, TensorRT 11 or TensorRT-RTX, and runs them.

    Args:
        driver: what the NVIDIA driver reports.
        gpu: the GPU of `open_device`; None: engines are only built, for other machines.
        open_device: called when something is to be run for the first time.
    """

    threads = 1  # of the CPU: an engine call only enqueues
    plans_by_batch = False

    def __init__(
        self,
        library: TensorRTLibrary,
        options: TensorRTOptions,
        *,
        driver: Driver,
        gpu: Gpu | None,
        open_device: Callable[[], CudaDevice],
    ) -> None:
        if library.is_rtx:
            library.check_targets(options.sms)
            _check_refit(options, driver)
        self._library = library
        self._options = options
        self._driver = driver
        self._gpu = gpu
        self._open_device = open_device
        self._timing_cache: TimingCache | None = None
        if library.has_timing_cache and gpu is not None:
            self._timing_cache = TimingCache(
                gpu_cache_path("timing", gpu=gpu.name, cuda_version=driver.cuda_text, library=library.title)
            )

    def activation_layout(self, network: NetworkSpec) -> str:
        channels = [tensor.shape[1] for part in network.parts for tensor in feature_maps(part)]
        # with other numbers of channels the buffers would need padding
        fits = all(isinstance(c, int) and c % CHANNEL_BLOCK == 0 for c in channels)
        return CHANNELS_LAST if fits else PLAIN_LAYOUT

    def build(self, part: PartSpec, model: bytes, *, layout: str) -> BuiltEngine:
        with self.current() if self._runs_here else nullcontext():  # TensorRT times kernels on the GPU that is current
            compiled = compile_part(
                self._library, part, model, layout=layout, options=self._options, timing_cache=self._timing_cache
            )
        details: dict[str, Any] = {"convolutions": compiled.convolutions}
        plan = compiled.plan
        if plan is not None:
            details |= {
                "kernels": [f"{kernel.name}: {kernel.dtype}" for kernel in plan.kernels],
                "kernel_types": plan.dtypes,
                "architectures": list(plan.architectures),
                "tf32": plan.tf32,
                "capturable": plan.capturable,
            }
        stripped = self._options.strip_weights
        error = layers = None
        if self._runs_here and not stripped:
            layers = self._runtime.layers(part, compiled.data)
            error = self._check(part, model, compiled.data, layout)
        return BuiltEngine(
            data=compiled.data, layout=layout, error=error, details=details, layers=layers, loadable=not stripped
        )

    def load(self, part: PartSpec, data: bytes, *, layout: str) -> Engine:
        return self._runtime.load(part, data, layout=layout)

    def allow_host_code(self) -> None:
        self._runtime.allow_host_code()

    def join(self, joined: PartSpec, pieces: Sequence[tuple[PartSpec, bytes]]) -> JoinedEngine:
        raise EngineError(f"{self._library.name} cannot join engines; build the parts joined as ONNX instead")

    def fuse(self, network: NetworkSpec, pieces: Mapping[str, bytes]) -> bytes:
        raise EngineError(
            f"{self._library.name} copies each condition to the host and cannot be captured with it; "
            "use --backend onnxruntime for strategy 'fused'"
        )

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return DeviceBuffer(self._runtime.device, shape, dtype)

    def check_device_array(self, values: DeviceArray) -> None:
        self._runtime.device.require_own(values.address, "images")

    def concatenate(self, values: Sequence[DeviceArray]) -> DeviceArray:
        return concatenate(self._runtime.device, values)

    def current(self) -> AbstractContextManager[None]:
        return self._runtime.device.current()

    def timer(self) -> DeviceTimer:
        return self._runtime.device.timer()

    def capturer(self) -> Capturer:
        return TensorRTCapturer(self._runtime.device)

    @property
    def _runs_here(self) -> bool:
        """Whether what is built is for the GPU that is here."""
        if self._gpu is None or not self._driver.usable:
            return False
        return not self._library.is_rtx or self._gpu.sm in self._options.sms

    @cached_property
    def _runtime(self) -> TensorRTRuntime:
        name = self._library.name
        if self._gpu is None:
            raise BackendError(f"backend {name!r} runs its engines on a GPU: give --device cuda:0")
        cache = None
        if self._library.is_rtx:
            cuda = self._driver.cuda_text
            path = gpu_cache_path("runtime", gpu=self._gpu.name, cuda_version=cuda, library=self._library.title)
            cache = RuntimeCache(path)
        runtime = TensorRTRuntime(self._library, self._open_device(), cache=cache)
        if self._options.version_compatible:
            runtime.allow_host_code()
        if cache is not None:  # when the last engine may have been compiled, at the latest at exit
            runtime.device.on_collection(self, runtime.save)
        return runtime

    def _check(self, part: PartSpec, model: bytes, data: bytes, layout: str) -> float | None:
        if "bfloat16" in {tensor.dtype for tensor in (*part.inputs, *part.outputs)}:
            return None  # neither numpy nor ONNX Runtime on the CPU computes in it
        n_images = self._options.nearest_batch(N_PROBES)
        return check_engine(part, model, self.load(part, data, layout=layout), n_images=n_images)


def _check_refit(options: TensorRTOptions, driver: Driver) -> None:
    """Raise BackendError where TensorRT-RTX would build part for part in vain: these two it compiles on a GPU."""
    asked = [flag for flag, given in (("--refit", options.refit), ("--strip-weights", options.strip_weights)) if given]
    if asked and not driver.usable:
        raise BackendError(
            f"{' and '.join(asked)}: TensorRT-RTX needs a GPU for it, and here there is none "
            f"({driver.error or 'the driver lists no GPU'}). Leave it out, or build where there is one"
        )


def open_tensorrt(identity: BackendIdentity, device: str, options: TensorRTOptions) -> TensorRTBackend:
    """Return the backend that `identity` names, its library imported.

    Raises:
        BackendError: the library cannot be imported.
    """
    driver = driver_from_libcuda()
    kind, _, index = device.partition(":")
    gpu = driver.gpus[int(index)] if kind == "cuda" and int(index) < len(driver.gpus) else None
    library = load_library(identity.name)
    return TensorRTBackend(library, options, driver=driver, gpu=gpu, open_device=lambda: open_device(device))

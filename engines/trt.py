"""The backends `tensorrt` and `tensorrt-rtx`: engines from ONNX parts. Running them is not part of this version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bdtool.errors import BackendError, EngineError
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import PLAIN_LAYOUT, BackendIdentity, Buffer, BuiltEngine, Engine
from engines.layouts import CHANNELS_LAST, feature_maps
from engines.libcuda import Driver, Gpu, driver_from_libcuda
from engines.timing_cache import TimingCache, timing_cache_path
from engines.trt_build import CHANNEL_BLOCK, compile_part
from engines.trt_library import TensorRTLibrary, load_library
from engines.trt_options import TensorRTOptions
from engines.trt_plan import plan_from_bytes


class TensorRTBackend:
    """Builds engines with TensorRT 10, TensorRT 11 or TensorRT-RTX."""

    threads = 1  # of the CPU: an engine call only enqueues

    def __init__(self, library: TensorRTLibrary, options: TensorRTOptions, *, driver: Driver, gpu: Gpu | None) -> None:
        if library.is_rtx:
            library.check_targets(options.sms)
        self._library = library
        self._options = options
        self._driver = driver
        self._timing_cache: TimingCache | None = None
        if library.has_timing_cache and gpu is not None:
            cuda = ".".join(map(str, driver.cuda_version))
            path = timing_cache_path(gpu=gpu.name, cuda_version=cuda, library_version=library.module.__version__)
            self._timing_cache = TimingCache(path)

    def activation_layout(self, network: NetworkSpec) -> str:
        channels = [tensor.shape[1] for part in network.parts for tensor in feature_maps(part)]
        # with other numbers of channels the buffers would need padding
        fits = all(isinstance(c, int) and c % CHANNEL_BLOCK == 0 for c in channels)
        return CHANNELS_LAST if fits else PLAIN_LAYOUT

    def build(self, part: PartSpec, model: bytes, *, layout: str) -> BuiltEngine:
        compiled = compile_part(
            self._library, part, model, layout=layout, options=self._options, timing_cache=self._timing_cache
        )
        details: dict[str, Any] = {"convolutions": compiled.convolutions}
        plan = plan_from_bytes(compiled.data)
        if plan is not None:
            details |= {
                "kernels": [f"{kernel.name}: {kernel.dtype}" for kernel in plan.kernels],
                "kernel_types": plan.dtypes,
                "architectures": list(plan.architectures),
                "tf32": plan.tf32,
                "capturable": plan.capturable,
            }
        layers = self._inspect(part, compiled.data) if self._driver.usable and not self._options.strip_weights else None
        return BuiltEngine(data=compiled.data, layout=layout, error=None, details=details, layers=layers)

    def load(self, part: PartSpec, data: bytes, *, layout: str) -> Engine:
        raise BackendError(
            f"backend {self._library.name!r} builds engines; this version of bdtool cannot run them. "
            "Use --backend torch or onnxruntime to run the bundle"
        )

    def join(self, joined: PartSpec, pieces: Sequence[tuple[PartSpec, bytes]]) -> tuple[Engine, int]:
        raise EngineError(f"{self._library.name} cannot join engines; build the parts joined as ONNX instead")

    def fuse(self, network: NetworkSpec, pieces: Mapping[str, bytes]) -> bytes:
        raise EngineError(
            f"{self._library.name} copies each condition to the host and cannot be captured with it; "
            "use --backend onnxruntime for strategy 'fused'"
        )

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        raise BackendError(f"backend {self._library.name!r} cannot run engines in this version of bdtool")

    def _inspect(self, part: PartSpec, data: bytes) -> str:
        """Return TensorRT's own account of the engine, layer by layer, as JSON; it takes a GPU."""
        trt = self._library.module
        with self._library.quoting(f"part {part.name!r}: its engine cannot be read back", EngineError):
            engine = trt.Runtime(self._library.log).deserialize_cuda_engine(data)
            if engine is None:
                raise EngineError(f"part {part.name!r}: its engine cannot be read back: {self._library.quoted()}")
            text: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
            return text


def open_tensorrt(identity: BackendIdentity, device: str, options: TensorRTOptions) -> TensorRTBackend:
    """Return the backend that `identity` names, its library imported.

    Raises:
        BackendError: the library cannot be imported.
    """
    driver = driver_from_libcuda()
    index = int(device.partition(":")[2] or 0)
    gpu = driver.gpus[index] if index < len(driver.gpus) else None
    return TensorRTBackend(load_library(identity.name), options, driver=driver, gpu=gpu)

"""TensorRT engines loaded on a GPU and run on its stream, the same way for TensorRT 10, 11 and TensorRT-RTX.

An engine has one execution context for plain calls, and one more for each time that it is captured, since a captured
graph holds the addresses of its context. All contexts work in one piece of scratch memory: their calls are in order on
one stream. A TensorRT-RTX plan alone asks for about 10 MB, so that a context each would cost a ResNet-110 a gigabyte.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bdtool.errors import EngineError
from bdtool.specs import PartSpec
from engines.base import Buffer, Call, Engine, PartEngine, run_through_buffers
from engines.capture import Captured
from engines.cuda_buffer import DeviceBuffer, device_buffer
from engines.cuda_device import FREE_MEMORY, START_AGAIN, CudaDevice, DeviceMemory
from engines.rtx_cache import RuntimeCache
from engines.trt_library import TensorRTLibrary

# by TensorRT's names
_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8"}
# said by TensorRT-RTX 1.7.1 of INT8 convolutions with a dynamic batch
_ONE_BATCH_ONLY = "implementation for fallback shapes"


class _Held:
    """An object of TensorRT to which only `value` refers: it is destroyed on its own GPU, whichever thread lets it go.

    Without a context that is current CUDA takes GPU 0, starts a context there, and leaves it to the thread.
    """

    def __init__(self, device: CudaDevice, value: Any) -> None:
        self.value = value
        device.on_collection(self, _let_go, self.__dict__, device)


def _let_go(members: dict[str, Any], device: CudaDevice) -> None:
    """Destroy what they refer to, with the device, whose context is current, still there."""
    members.clear()


class TensorRTRuntime:
    """Loads engines of one library onto one device."""

    def __init__(self, library: TensorRTLibrary, device: CudaDevice, *, cache: RuntimeCache | None = None) -> None:
        self.device = device
        self.library = library
        self._cache = cache  # of the kernels that TensorRT-RTX compiles when it makes a context
        with device.current(), library.quoting(f"{library.name} does not start on cuda:{device.index}", EngineError):
            self._runtime = _Held(device, library.module.Runtime(library.log))
        self._scratch_bytes = 0
        self._scratch: DeviceMemory | None = None

    def allow_host_code(self) -> None:
        """Let engines be loaded that bring TensorRT's lean runtime along, machine code that the host runs."""
        self._runtime.value.engine_host_code_allowed = True

    def save(self) -> None:
        """Keep what the library compiled for this GPU, if it has a cache for it, with the device's context current."""
        if self._cache is not None:
            self._cache.save()

    def load(self, part: PartSpec, data: bytes, *, layout: str) -> TensorRTEngine:
        """Deserialize an engine.

        Raises:
            EngineError: the library refuses it (quoted), or its tensors are not those of the part.
        """
        engine = self._deserialize(part, data)
        self._scratch_bytes = max(self._scratch_bytes, int(engine.value.device_memory_size_v2))
        return TensorRTEngine(part, engine, self, layout=layout)

    def layers(self, part: PartSpec, data: bytes) -> str:
        """Return the library's own account of an engine, layer by layer, as JSON.

        Raises:
            EngineError: the library refuses the engine (quoted).
        """
        form = self.library.module.LayerInformationFormat.JSON
        engine = self._deserialize(part, data)
        with self.device.current(), self.library.quoting(f"part {part.name!r}: its layers", EngineError):
            text: str = engine.value.create_engine_inspector().get_engine_information(form)
            return text

    def _deserialize(self, part: PartSpec, data: bytes) -> _Held:
        name = self.library.name
        loading = f"part {part.name!r}: {name} cannot load its engine"
        with self.device.current(), self.library.quoting(loading, EngineError):
            engine = self._runtime.value.deserialize_cuda_engine(data)
            if engine is None:
                reason = self.library.quoted() or "no reason given"
                raise EngineError(
                    f"part {part.name!r}: {name} {self.library.module.__version__} cannot load its engine: {reason}. "
                    f"{_remedy(reason)}"
                )
            return _Held(self.device, engine)

    def context(self, part: PartSpec, engine: _Held, *, beside: bool = False) -> tuple[_Held, DeviceMemory]:
        """Return a new execution context and the scratch memory it works in, which must live as long.

        Args:
            beside: its calls run beside those of others, so it gets scratch memory of its own.

        Raises:
            EngineError: the library gives none.
        """
        context = self._new_context(part, engine)
        # its own default is what the engine was built with, and details take time in each call (NvInferRuntime.h)
        context.value.nvtx_verbosity = self.library.module.ProfilingVerbosity.LAYER_NAMES_ONLY
        if self._cache is not None:
            self._cache.keep_for(context.value)
        scratch = self._new_scratch() if beside else self._shared_scratch()
        context.value.set_device_memory(scratch.address, scratch.n_bytes)
        return context, scratch

    def _new_context(self, part: PartSpec, engine: _Held) -> _Held:
        what = f"part {part.name!r}: {self.library.name} makes no execution context"
        with self.device.current(), self.library.quoting(what, EngineError):
            context = engine.value.create_execution_context(self._allocation(engine.value))
            if context is None:
                reason = self.library.quoted() or "no reason given"
                advice = "Build it again with --max-batch 1" if _ONE_BATCH_ONLY in reason else _cuda_advice(reason)
                raise EngineError(f"{what}: {reason}" + (f". {advice}" if advice else ""))
            return _Held(self.device, context)

    def _allocation(self, engine: Any) -> Any:
        """Return what makes a context work in memory that we give: a strategy, in TensorRT-RTX within a config."""
        trt = self.library.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.library.is_rtx:
            return strategy
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # graphs are captured by us
        # for a dynamic batch: compiled at once, not later while a graph is captured or a clock runs
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is not None:
            self._cache.apply(config)
        return config

    def _shared_scratch(self) -> DeviceMemory:
        """Return scratch memory that is large enough for every engine loaded so far."""
        if self._scratch is None or self._scratch.n_bytes < self._scratch_bytes:
            self._scratch = self._new_scratch()
        return self._scratch

    def _new_scratch(self) -> DeviceMemory:
        return self.device.allocate(max(self._scratch_bytes, 256))


class TensorRTEngine(PartEngine):
    """One part, loaded. Its calls enqueue on the device's stream and do not wait."""

    def __init__(self, part: PartSpec, engine: _Held, runtime: TensorRTRuntime, *, layout: str) -> None:
        self.layout = layout
        super().__init__(part)
        self._engine = engine
        self._runtime = runtime
        self._context: _Context | None = None
        _check_tensors(part, engine)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        device = self._runtime.device
        with device.current():  # also where nobody has made it so: a build compares its engines
            return run_through_buffers(self, feeds, functools.partial(DeviceBuffer, device))

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        if self._context is None:
            self._context = _Context(self._part, self._engine, self._runtime)
        return self._context.call(inputs, outputs, stream=self._runtime.device.stream)

    def capture(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, beside: bool) -> Captured:
        """Capture one call, in an execution context that nothing else uses; see `engines.capture.Capturer`."""
        device = self._runtime.device
        context = _Context(self._part, self._engine, self._runtime, beside=beside)
        call = context.call(inputs, outputs, stream=device.capture_stream)
        device.synchronize()  # work on the other stream may be using the buffers and the scratch memory
        call()  # compiles and sets up whatever the first call after a change of shape or address does
        device.synchronize(device.capture_stream)
        context.check_capturable(device.capture_stream)
        graph = device.capture(call)
        return Captured(graph=graph, keep_alive=call, release=lambda: device.cu.cuGraphDestroy(graph))


class TensorRTCapturer:
    """Captures calls of TensorRT engines."""

    def __init__(self, device: CudaDevice) -> None:
        self.device = device

    def address(self, buffer: Buffer) -> int:
        return device_buffer(buffer).address

    def capture(
        self, engine: Engine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, beside: bool
    ) -> Captured:
        assert isinstance(engine, TensorRTEngine)  # the backend's own
        return engine.capture(inputs, outputs, beside=beside)


class _Context:
    """An execution context, with the shapes and addresses that it was last given."""

    def __init__(self, part: PartSpec, engine: _Held, runtime: TensorRTRuntime, *, beside: bool = False) -> None:
        self._part = part
        self._engine = engine
        self._runtime = runtime
        self._trt, self._scratch = runtime.context(part, engine, beside=beside)
        runtime.device.on_collection(self, runtime.device.finish)  # its work may be under way
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._addresses: Mapping[str, int] = {}

    def call(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, stream: Any) -> Call:
        """Return a call that enqueues on a CUstream."""
        given = {name: device_buffer(buffer) for name, buffer in (*inputs.items(), *outputs.items())}
        shapes = {name: given[name].shape for name in inputs}
        addresses = {name: buffer.address for name, buffer in given.items()}
        self._check_batch(shapes)
        context, handle = self._trt, int(stream)

        def call() -> None:
            if addresses is not self._addresses:
                self._point_to(shapes, addresses)
            if not context.value.execute_async_v3(handle):
                raise self._error("does not run it")

        call.keep_alive = (self, given)  # type: ignore[attr-defined]  # the context has only the addresses
        return call

    def check_capturable(self, stream: Any) -> None:
        """Raise EngineError where the library says that its work cannot become part of a CUDA graph."""
        if not hasattr(self._trt.value, "is_stream_capturable"):  # TensorRT has no such question
            return
        if not self._trt.value.is_stream_capturable(int(stream)):
            raise self._error(
                "cannot be captured in a CUDA graph. Use --strategy chain, or build it with a static batch"
            )

    def _point_to(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        self._addresses = {}  # until all of them are accepted
        if shapes != self._shapes:
            for name, shape in shapes.items():
                if not self._trt.value.set_input_shape(name, shape):
                    raise self._error(f"refuses shape {list(shape)} of {name!r}")
            self._shapes = shapes
        for name, address in addresses.items():
            if not self._trt.value.set_tensor_address(name, address):
                raise self._error(f"refuses the memory of {name!r}")
        self._addresses = addresses

    def _check_batch(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, given in shapes.items():
            least, _, most = (shape[0] for shape in self._engine.value.get_tensor_profile_shape(name, 0))
            if not least <= given[0] <= most:
                raise EngineError(
                    f"part {self._part.name!r}, input {name!r}: got batch {given[0]}, its engine takes {least} to "
                    f"{most}. Build it again with --min-batch and --max-batch, or run smaller batches"
                )

    def _error(self, what: str) -> EngineError:
        library = self._runtime.library
        reason = library.quoted()
        return EngineError(f"part {self._part.name!r}: {library.name} {what}" + (f": {reason}" if reason else ""))


def _remedy(reason: str) -> str:
    """Return what to do about an engine that was not loaded: it may be whole."""
    if re.search(r"[Ee]rror:? 35\b", reason):  # cudaErrorInsufficientDriver, also where there is no driver
        return "The driver is too old for this library, or there is none: `bdtool doctor` says what fits"
    return _cuda_advice(reason) or "Build it again on this machine"


def _cuda_advice(reason: str) -> str | None:
    """Return what to do where it is CUDA that failed."""
    if re.search(r"out ?of ?memory", reason, re.IGNORECASE):
        return FREE_MEMORY
    # cudaErrorIllegalAddress and cudaErrorLaunchFailure, of whatever ran before: no call works after them
    return START_AGAIN if re.search(r"cudaError (700|719)\b", reason) else None


def _check_tensors(part: PartSpec, engine: _Held) -> None:
    """Raise EngineError unless the engine's tensors have the names and types of the part's."""
    names = [engine.value.get_tensor_name(i) for i in range(engine.value.num_io_tensors)]
    found = {name: _TYPES.get(engine.value.get_tensor_dtype(name).name, "another type") for name in names}
    expected = {tensor.name: tensor.dtype for tensor in (*part.inputs, *part.outputs)}
    if found != expected:
        raise EngineError(
            f"part {part.name!r}: its engine has tensors {found}, the bundle says {expected}; build it again"
        )

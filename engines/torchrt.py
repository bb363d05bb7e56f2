"""PyTorch as a backend: nothing else to install, cuDNN on a GPU, and every GPU that PyTorch knows.

An engine file is the ONNX part itself. Activations lie in memory as its convolutions want them; from outside they are
plain arrays.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bdtool.errors import BackendError, DataError, EngineError, UsageError
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import (
    ENGINE_BOUNDS,
    PLAIN_LAYOUT,
    Buffer,
    BuiltEngine,
    Call,
    Engine,
    EngineBound,
    JoinedEngine,
    PartEngine,
)
from engines.capture import Capturer
from engines.check import check_engine
from engines.cuda_device import open_device
from engines.device_array import DeviceArray
from engines.device_timer import CopyWatch, DeviceTimer
from engines.torch_buffer import TorchBuffer, device_array_of, host_tensor, memory_order, owned_tensor, tensor_of
from engines.torch_errors import GPU_ERRORS, engine_error, gpu_errors_translated
from engines.torch_graph import TorchCapturer
from engines.torch_onnx import Function, OnnxFunction
from engines.torch_precision import convolve_exactly
from export.files import sha256_of_bytes
from export.ort_threads import checked_threads

# fp16 keeps 11 bits, and the reference sums its products in another order and precision
_BOUNDS = {**ENGINE_BOUNDS, "fp16": EngineBound(tolerance=5e-3)}
_Owner = TypeVar("_Owner")


class TorchBackend:
    """PyTorch on "cpu" or "cuda:N".

    Its CPU threads belong to the process, as ONNX Runtime's do: the last backend that is opened sets their number. On
    CUDA it makes convolutions of the process compute in FP32 instead of TF32. Work goes to PyTorch's current stream;
    where that is another one than before, it waits for what was enqueued before.
    """

    plans_by_batch = False

    def __init__(self, *, device: str = "cpu", threads: int | None = None) -> None:
        self.device = _usable_device(device)
        self.threads = checked_threads(threads)
        self._copies = CopyWatch()  # between host and device
        self._functions: weakref.WeakValueDictionary[tuple[str, str], OnnxFunction] = weakref.WeakValueDictionary()
        self._fuses = self.device.type == "cuda"  # cuDNN has kernels for it, the CPU has none
        self._in_order = _InOrder(self.device) if self.device.type == "cuda" else None
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)
        convolve_exactly(self.device)

    def current(self) -> AbstractContextManager[None]:
        return nullcontext() if self._in_order is None else self._in_order

    def activation_layout(self, network: NetworkSpec) -> str:
        return PLAIN_LAYOUT  # channels-last is how tensors lie in memory; their values are in NCHW order

    def build(self, part: PartSpec, model: bytes, *, layout: str) -> BuiltEngine:
        error = check_engine(part, model, self._open(part, model), bounds=_BOUNDS)
        return BuiltEngine(data=model, layout=layout, error=error)

    def load(self, part: PartSpec, data: bytes, *, layout: str) -> Engine:
        if layout != PLAIN_LAYOUT:
            raise EngineError(f"part {part.name!r}: its engine has layout {layout!r}, torch's have {PLAIN_LAYOUT!r}")
        return self._open(part, data)

    def join(self, joined: PartSpec, pieces: Sequence[tuple[PartSpec, bytes]]) -> JoinedEngine:
        missing = [len(data) for part, data in pieces if _key(part, data) not in self._functions]
        functions = [self._function(part, data) for part, data in pieces]

        def run(x: Tensor) -> Tensor:
            for function in functions:
                x = function(x)
            return x

        # only calls of the parts' functions, whose weights the engines of the parts hold already where they are loaded
        return JoinedEngine(engine=TorchEngine(joined, run, self.device), own_bytes=0, shared_bytes=sum(missing))

    def fuse(self, network: NetworkSpec, pieces: Mapping[str, bytes]) -> bytes:
        raise UsageError("the torch backend has no conditionals; use --backend onnxruntime for strategy 'fused'")

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        with gpu_errors_translated(f"memory for {dtype} {list(shape)} on {self.device}"):
            tensor = torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)
            return self._lasting(TorchBuffer(tensor.contiguous(memory_format=memory_order(tensor)), self._copies))

    def check_device_array(self, values: DeviceArray) -> None:
        if self.device.type == "cpu":
            raise DataError("images: got a GPU array, the torch backend runs on the CPU. Open it with device='cuda:0'")
        try:
            found = torch.as_tensor(values.owner, device=self.device)
        except (RuntimeError, ValueError, TypeError) as exc:  # also where its memory is of another context
            raise DataError(
                f"images: PyTorch cannot read the GPU array on {self.device} ({exc}). With PyCUDA import "
                "pycuda.autoprimaryctx instead of pycuda.autoinit"
            ) from exc
        if found.data_ptr() != values.address:  # of another GPU PyTorch makes a copy, and does not wait for its stream
            raise DataError(
                f"images: the GPU array is not on {self.device}. Copy it there first, or open the bundle with its GPU"
            )

    def concatenate(self, values: Sequence[DeviceArray]) -> DeviceArray:
        return device_array_of(torch.cat([owned_tensor(one) for one in values]))

    def timer(self) -> DeviceTimer | None:
        if self.device.type == "cpu":
            return None
        device = self.device
        return DeviceTimer(lambda: _TimingEvent(device), lambda: torch.cuda.synchronize(device), self._copies)

    def capturer(self) -> Capturer:
        device = self.device
        # asked at each launch, as PyTorch asks at each copy: a user may have changed it
        return TorchCapturer(open_device(str(device), stream=lambda: torch.cuda.current_stream(device).cuda_stream))

    def _open(self, part: PartSpec, data: bytes) -> TorchEngine:
        return TorchEngine(part, self._function(part, data), self.device)

    def _function(self, part: PartSpec, data: bytes) -> OnnxFunction:
        """Return the part's function; equal parts, loaded or joined, share one and so the memory of its weights."""
        key = _key(part, data)
        function = self._functions.get(key)
        if function is None:
            with gpu_errors_translated(f"part {part.name!r}: its weights on {self.device}"):
                function = OnnxFunction(part, data, self.device, fuse=self._fuses)
            self._functions[key] = self._lasting(function)
        return function

    def _lasting(self, owner: _Owner) -> _Owner:
        """Let the memory of an object last until no work uses it; return the object."""
        if self._in_order is not None:
            weakref.finalize(owner, self._in_order.wait).atexit = False
        return owner


class _InOrder:
    """A `with` around work on PyTorch's current stream, which waits for the work before where that was on another.

    Buffers are the same whatever the stream, and who takes results on the device does not wait for them. It waits for
    an event, as its owner may have given the other stream back since.

    What fails on the GPU shows in whatever call comes next, so that here it becomes an EngineError.

    Memory belongs to the stream on which it was allocated, and PyTorch gives it to that stream's next work as soon as
    it is free: `wait` before that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = os.getpid()
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        if self._done is not None and stream != self._stream:
            stream.wait_event(self._done)
        self._stream = stream

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        what = f"work on {self._device}"
        try:
            if self._done is None:
                self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(self._stream)
        except GPU_ERRORS as exc:
            if error is None:
                raise engine_error(what, exc) from exc
        if isinstance(error, GPU_ERRORS):
            raise engine_error(what, error) from error

    def wait(self) -> None:
        """Let the host wait for all work so far, whatever failed; not in a fork, which has no part in the parent's."""
        if self._done is not None and self._process == os.getpid():
            with suppress(*GPU_ERRORS):  # a finalizer's error would have nobody to go to, and each buffer has one
                self._done.synchronize()


def _key(part: PartSpec, data: bytes) -> tuple[str, str]:
    return part.name, sha256_of_bytes(data)


class TorchEngine(PartEngine):
    """One part as torch calls."""

    layout = PLAIN_LAYOUT

    def __init__(self, part: PartSpec, function: Function, device: torch.device) -> None:
        super().__init__(part)
        self._function = function
        self._device = device

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        [source], [result] = self._part.inputs, self._part.outputs
        with gpu_errors_translated(f"part {self._part.name!r} on {self._device}"):
            x = host_tensor(feeds[source.name]).to(self._device)
            x = x.contiguous(memory_format=memory_order(x))
            return {result.name: np.ascontiguousarray(self._call(x).cpu().numpy())}

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        [source], [result] = self._part.inputs, self._part.outputs
        x, y = tensor_of(inputs[source.name]), tensor_of(outputs[result.name])

        def call() -> None:
            y.copy_(self._call(x))

        return call

    def _call(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(self._device.type):
            return self._computed(x)
        # the caller's is for models of its own: parts say their types
        with torch.autocast(self._device.type, enabled=False):
            return self._computed(x)

    def _computed(self, x: Tensor) -> Tensor:
        try:
            with torch.inference_mode():
                return self._function(x)
        except RuntimeError as exc:
            raise engine_error(f"part {self._part.name!r}: PyTorch failed to run it", exc) from exc


class _TimingEvent:
    """An event on the current stream of one GPU; PyTorch's own take the current GPU's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def elapsed_time(self, end: _TimingEvent, /) -> float:
        return float(self._event.elapsed_time(end._event))


def _usable_device(device: str) -> torch.device:
    """Return the device; raise BackendError unless PyTorch can use it."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        if not torch.cuda.is_available():
            built_for = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for the CPU only"
            raise BackendError(
                f"device {device!r}: PyTorch {torch.__version__} {built_for} and finds no usable GPU; "
                "see `bdtool doctor`, or use --device cpu"
            )
        if int(index) >= torch.cuda.device_count():
            raise BackendError(
                f"device {device!r}: PyTorch sees {torch.cuda.device_count()} GPU(s), cuda:0 is the first"
            )
    return torch.device(device)

"""One GPU through NVIDIA's driver API: its primary context, one stream, memory, copies, and captured work.

The primary context is the one that PyTorch and TensorRT use, so that memory, streams and graphs are common to all of
them. Only this file and the kernels' compiler import `cuda.bindings`. Written against cuda-bindings 12.9 to 13.x and
tested against a stand-in that computes on host memory; run on an H100 with 13.3.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from importlib.metadata import version
from math import prod
from typing import Any

import numpy as np

from bdtool.errors import BackendError, DataError, EngineError
from engines.device_timer import CopyWatch, DeviceTimer
from export.packages import install_command

FREE_MEMORY = "Free memory on the GPU: nvidia-smi lists who has it"
START_AGAIN = "Work on the GPU failed, and this process can use it no more: start it again"
_ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": FREE_MEMORY,
    "CUDA_ERROR_ILLEGAL_ADDRESS": START_AGAIN,
    "CUDA_ERROR_LAUNCH_FAILED": START_AGAIN,
}
_TIMING_OF_13 = 12080  # cuEventElapsedTime_v2, which cuda-bindings 13 call, is in drivers since CUDA 12.8


def checked(cu: Any, result: tuple[Any, ...], what: str) -> Any:
    """Return what a driver call gave besides its status.

    Raises:
        EngineError: the status is not success.
    """
    status, *values = result
    if status != cu.CUresult.CUDA_SUCCESS:
        advice = f". {_ADVICE[status.name]}" if status.name in _ADVICE else ""
        raise EngineError(f"the CUDA driver refuses {what}: {status.name}{advice}")
    return values[0] if len(values) == 1 else tuple(values)


def _in_context(cu: Any, context: Any, give_back: Callable[..., object], *what: object) -> None:
    """Give something back in its context, whichever thread collects it; its status would have nobody to go to."""
    status, *_ = cu.cuCtxPushCurrent(context)
    if status == cu.CUresult.CUDA_SUCCESS:  # else the context is gone, and all that was in it
        give_back(*what)
        cu.cuCtxPopCurrent()


class _NothingCollected:
    """A `with` in which no cycles are collected, in whichever of the threads that are within it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_within = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._n_within == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._n_within += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._n_within -= 1
            if self._n_within == 0 and self._was_enabled:
                gc.enable()


_NOTHING_COLLECTED = _NothingCollected()  # collecting is a matter of the process


def nothing_collected() -> AbstractContextManager[None]:
    """Within it no cycles are collected: giving their memory back waits for the stream, which ends a capture."""
    return _NOTHING_COLLECTED


class _Current:
    """A context pushed and popped; one serves all, without state. A generator would take three times as long."""

    def __init__(self, cu: Any, context: Any) -> None:
        self._cu, self._context = cu, context

    def __enter__(self) -> None:
        checked(self._cu, self._cu.cuCtxPushCurrent(self._context), "its primary context")

    def __exit__(self, *error: object) -> None:
        self._cu.cuCtxPopCurrent()


class DeviceMemory:
    """Zeroed memory of a device, 256-byte aligned; given back when nothing refers to this object any more."""

    def __init__(self, device: CudaDevice, n_bytes: int) -> None:
        cu = device.cu
        self.n_bytes = n_bytes
        with device.current():
            address = checked(cu, cu.cuMemAlloc(max(n_bytes, 1)), f"{n_bytes} bytes of memory")
            self.address = int(address)
            device.on_collection(self, cu.cuMemFree, address)  # which waits for work that may still use the memory
            checked(cu, cu.cuMemsetD8Async(address, 0, n_bytes, device.stream), "to clear memory")


class CudaEvent:
    """A point on the device's stream; see `engines.device_timer.Event`."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        cu = device.cu
        self._event = checked(cu, cu.cuEventCreate(int(cu.CUevent_flags.CU_EVENT_DEFAULT)), "an event")
        device.on_collection(self, cu.cuEventDestroy, self._event)

    def record(self, stream: int | None = None) -> None:
        """Put it on the device's stream, or on another one."""
        cu = self._device.cu
        where = self._device.stream if stream is None else cu.CUstream(stream)
        checked(cu, cu.cuEventRecord(self._event, where), "to record an event")

    def hold(self, stream: int | None = None) -> None:
        """Let the device's stream, or another one, wait until the event is passed."""
        cu = self._device.cu
        where = self._device.stream if stream is None else cu.CUstream(stream)
        checked(cu, cu.cuStreamWaitEvent(where, self._event, 0), "to wait for an event")

    def synchronize(self) -> None:
        """Wait until it is passed."""
        checked(self._device.cu, self._device.cu.cuEventSynchronize(self._event), "to wait for an event")

    def elapsed_time(self, end: CudaEvent, /) -> float:
        cu = self._device.cu
        with self._device.current():
            return float(checked(cu, cu.cuEventElapsedTime(self._event, end._event), "the time between two events"))


class CudaDevice:
    """GPU number `index` of the driver `cu`: the module `cuda.bindings.driver`, or a stand-in with its functions.

    Work goes to one stream, in order. The host waits in `download`, `synchronize` and `CudaEvent.synchronize`.

    Args:
        stream: gives the address of somebody else's stream, asked each time that work is put there; None: one is made.
    """

    def __init__(self, cu: Any, index: int, *, stream: Callable[[], int] | None = None) -> None:
        self.cu = cu
        self.index = index
        self.copies = CopyWatch()  # between host and device
        self._modules: dict[bytes, Any] = {}  # CUmodule by machine code
        checked(cu, cu.cuInit(0), "to start")
        self._device = checked(cu, cu.cuDeviceGet(index), f"device cuda:{index}")
        self.context = checked(cu, cu.cuDevicePrimaryCtxRetain(self._device), "its primary context")
        # at the end of the process the driver does it: TensorRT's objects of a runtime that nobody closed live longer
        weakref.finalize(self, cu.cuDevicePrimaryCtxRelease, self._device).atexit = False
        self._current = _Current(cu, self.context)
        self._others_stream = stream
        if stream is None:
            with self.current():
                self._own_stream = self._new_stream()

    @property
    def stream(self) -> Any:
        """The CUstream that work is put on now."""
        return self._own_stream if self._others_stream is None else self.cu.CUstream(self._others_stream())

    def _new_stream(self) -> Any:
        # Not the default stream: TensorRT would synchronise the device around each call on it, and it is not capturable
        flag = self.cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = checked(self.cu, self.cu.cuStreamCreate(int(flag)), "a stream")
        self.on_collection(self, self.cu.cuStreamDestroy, stream)
        return stream

    @property
    def sm(self) -> int:
        """Compute capability: 89 is 8.9."""
        return 10 * self._attribute("MAJOR") + self._attribute("MINOR")

    def make_current(self) -> None:
        """Make the primary context that of the calling thread; contexts belong to threads."""
        checked(self.cu, self.cu.cuCtxSetCurrent(self.context), "its primary context")

    def current(self) -> AbstractContextManager[None]:
        """Return a `with` in which the primary context is that of the calling thread; behind it, the one before is."""
        return self._current

    def on_collection(self, owner: object, give_back: Callable[..., object], *what: object) -> None:
        """Call `give_back` in the primary context once nothing refers to `owner` any more."""
        weakref.finalize(owner, _in_context, self.cu, self.context, give_back, *what)

    def allocate(self, n_bytes: int) -> DeviceMemory:
        return DeviceMemory(self, n_bytes)

    def host_array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return page-locked host memory, which a copy reads and writes where it is; its values are arbitrary.

        Other memory the driver copies into such memory of its own first, and has the host wait (CUDA driver API, "API
        synchronization behavior").
        """
        cu, n_bytes = self.cu, prod(shape) * dtype.itemsize
        with self.current():
            address = checked(cu, cu.cuMemHostAlloc(max(n_bytes, 1), 0), f"{n_bytes} bytes of page-locked memory")
        memory = (ctypes.c_uint8 * n_bytes).from_address(int(address))
        self.on_collection(memory, self._free_host, int(address))  # arrays keep the memory alive
        return np.frombuffer(memoryview(memory), dtype).reshape(shape)

    def _free_host(self, address: int) -> None:
        self.finish()  # a copy may be under way
        self.cu.cuMemFreeHost(address)

    def finish(self) -> None:
        """Wait for the stream as `synchronize` does, whatever failed in it: for what gives back what its work uses."""
        self.cu.cuStreamSynchronize(self.stream)

    def upload(self, address: int, values: np.ndarray) -> None:
        """Enqueue a copy to the device; `values`, a `host_array`, must stay as they are until it is done."""
        copy, size = self.cu.cuMemcpyHtoDAsync, values.nbytes
        status = self.copies.run("h2d", lambda: copy(address, values.ctypes.data, size, self.stream))
        checked(self.cu, status, f"a copy of {size} bytes to the device")

    def download(self, values: np.ndarray, address: int) -> None:
        """Fill `values`, a `host_array`, from the device; returns when they are there."""
        self.begin_download(values, address)
        self.synchronize()

    def begin_download(self, values: np.ndarray, address: int) -> None:
        """Enqueue a copy from the device; `values`, a `host_array`, are there once the stream was waited for."""
        copy, size = self.cu.cuMemcpyDtoHAsync, values.nbytes
        status = self.copies.run("d2h", lambda: copy(values.ctypes.data, address, size, self.stream))
        checked(self.cu, status, f"a copy of {size} bytes from the device")

    def copy(self, target: int, source: int, n_bytes: int) -> None:
        """Enqueue a copy within the device."""
        call = self.cu.cuMemcpyDtoDAsync(target, source, n_bytes, self.stream)
        checked(self.cu, call, f"a copy of {n_bytes} bytes on the device")

    def wait_for(self, stream: int) -> None:
        """Let what is enqueued from now on wait for the work that is on another stream now; the host does not wait."""
        event = CudaEvent(self)
        event.record(stream)
        event.hold()

    def hold_back(self, stream: int) -> None:
        """Let another stream wait for what is enqueued here now, before it goes on; the host does not wait."""
        event = CudaEvent(self)
        event.record()
        event.hold(stream)

    def require_own(self, address: int, what: str) -> None:
        """Raise unless memory belongs to the primary context, or to a pool of this GPU, which belongs to none.

        Raises:
            DataError: it is another GPU's, or another context's.
            EngineError: it is no device memory.
        """
        context, ordinal = (int(self._of_pointer(name, address)) for name in ("CONTEXT", "DEVICE_ORDINAL"))
        if ordinal != self.index:
            raise DataError(
                f"{what}: their memory is on cuda:{ordinal}, the engines run on cuda:{self.index}. Copy them there "
                f"first, or open the bundle with --device cuda:{ordinal}"
            )
        if context not in (0, int(self.context)):
            raise DataError(
                f"{what}: their memory belongs to another CUDA context than the primary one of cuda:{self.index}, as "
                "pycuda.autoinit makes it. Import pycuda.autoprimaryctx instead, and make the array again"
            )

    def _of_pointer(self, name: str, address: int) -> Any:
        attribute = getattr(self.cu.CUpointer_attribute, f"CU_POINTER_ATTRIBUTE_{name}")
        return checked(self.cu, self.cu.cuPointerGetAttribute(attribute, address), f"the address {address:#x}")

    def synchronize(self, stream: Any | None = None) -> None:
        """Wait for all work that was put on the device's stream, or on another one; what failed in it shows here."""
        where = self.stream if stream is None else stream
        checked(self.cu, self.cu.cuStreamSynchronize(where), "to finish the work enqueued")

    def timer(self) -> DeviceTimer:
        """Return a timer by events on the stream; it collects whichever context is current."""

        def synchronize() -> None:
            with self._current:
                self.synchronize()

        return DeviceTimer(lambda: CudaEvent(self), synchronize, self.copies)

    @cached_property
    def capture_stream(self) -> Any:
        """A CUstream that nobody else knows, where `stream` goes to whoever is given results that stay on the device.

        Work of another thread on a stream that is captured joins the capture, and waiting for such a stream ends it.
        """
        with self.current():
            return self._new_stream()

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Return the CUgraph of what `enqueue` puts on `capture_stream`; nothing of it runs.

        Raises:
            EngineError: the work cannot be captured. The stream is usable afterwards.
        """
        cu, stream = self.cu, self.capture_stream
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with nothing_collected():
            checked(cu, cu.cuStreamBeginCapture(stream, mode), "to capture")
            try:
                enqueue()
            except BaseException:
                status, graph = cu.cuStreamEndCapture(stream)
                if status == cu.CUresult.CUDA_SUCCESS:
                    cu.cuGraphDestroy(graph)
                raise
            return checked(cu, cu.cuStreamEndCapture(stream), "the captured work")

    def launch(self, executable: Any) -> None:
        """Enqueue an instantiated graph (CUgraphExec)."""
        with self._current:  # somebody else's stream may be the default one, and each context has one
            checked(self.cu, self.cu.cuGraphLaunch(executable, self.stream), "a graph launch")

    def function(self, cubin: bytes, name: str) -> Any:
        """Load machine code, once, and return its kernel `name` (CUfunction); it stays as long as this object."""
        cu = self.cu
        module = self._modules.get(cubin)
        if module is None:
            with self.current():
                module = checked(cu, cu.cuModuleLoadData(cubin), f"the machine code of kernel {name}")
            self._modules[cubin] = module
            self.on_collection(self, cu.cuModuleUnload, module)
        return checked(cu, cu.cuModuleGetFunction(module, name.encode()), f"kernel {name}")

    def _attribute(self, name: str) -> int:
        attribute = getattr(self.cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{name}")
        return int(checked(self.cu, self.cu.cuDeviceGetAttribute(attribute, self._device), "its compute capability"))


def _require_timing(driver: Any, device: str) -> None:
    """Refuse bindings that time events by a function which the driver does not have: it would be missed much later."""
    checked(driver, driver.cuInit(0), "to start")
    supported = checked(driver, driver.cuDriverGetVersion(), "its version")
    if supported < _TIMING_OF_13 and int(version("cuda-bindings").partition(".")[0]) >= 13:
        raise BackendError(
            f"device {device!r}: cuda-bindings {version('cuda-bindings')} need a driver of CUDA 12.8, this one "
            f"supports CUDA {supported // 1000}.{supported % 1000 // 10}. Install the older ones: "
            f"{install_command('cuda12')}"
        )


def open_device(device: str, *, stream: Callable[[], int] | None = None) -> CudaDevice:
    """Open "cuda:N" through the installed `cuda.bindings`; `stream` as for `CudaDevice`.

    Raises:
        BackendError: cuda-bindings is not installed or too new for the driver, there is no driver, or no such GPU.
    """
    try:
        from cuda.bindings import driver
    except ImportError as exc:
        raise BackendError(
            f"device {device!r}: needs cuda-bindings ({exc}); add it with: {install_command('cuda')}"
        ) from exc
    try:
        if stream is None:
            _require_timing(driver, device)
        return CudaDevice(driver, int(device.partition(":")[2]), stream=stream)
    except EngineError as exc:
        raise BackendError(f"device {device!r}: {exc}. See `bdtool doctor`") from exc
    except RuntimeError as exc:  # the bindings look for the driver's library at the first call
        raise BackendError(f"device {device!r}: no NVIDIA driver ({exc}). See `bdtool doctor`") from exc

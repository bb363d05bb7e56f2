"""A stand-in for what `cuda.bindings.driver` has of devices, contexts, streams, events and memory, on host memory.

Device addresses are addresses of numpy arrays, and a copy outside of what was allocated fails. Work that is enqueued
runs at once. What copies and launches take can be set.
"""

import ctypes
import threading
from collections import Counter

import numpy as np
import pytest

# They work in the context that is current: without one they fail, and an event of another one's cannot be put on the
# device's stream (CUDA driver API, `cuEventCreate` and `cuEventRecord`).
IN_CONTEXT = {
    *("cuStreamCreate", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuMemAlloc", "cuMemHostAlloc"),
    *("cuMemsetD8Async", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "cuModuleLoadData"),
}


class FakeDevice:
    """`failing` names a function that fails."""

    def __init__(self):
        self._real = pytest.importorskip("cuda.bindings.driver")
        self.version = 13000
        self.failing = None
        self.calls = Counter()
        self.memory, self.host_memory = {}, {}  # address: array
        self.copies = []  # "HtoD", "DtoH" and "DtoD", in order
        self.owners = {}  # address: the context that it belongs to, where it is not the primary one
        self.ordinals = {}  # address: the number of its GPU, where it is not 0
        self.astray = []  # what was destroyed while the primary context was not current
        self.events, self.time_ms = [], 0.0  # each piece of work takes a millisecond, if nothing else is said
        self.launch_ms = 0.0
        self.copy_ms = {"HtoD": 0.0, "DtoH": 0.0, "DtoD": 0.0}
        self.recorded_on, self.waited_for, self.held_back = {}, [], []  # streams
        self._capturing = None  # the stream that is captured, and the graph that its work goes to
        self._thread = threading.local()  # its stack of contexts

    def __getattr__(self, name):
        return getattr(self._real, name)

    def _done(self, name, *values):
        self.calls[name] += 1
        results = self.CUresult
        if name in IN_CONTEXT and not self._is_current():
            return results.CUDA_ERROR_INVALID_CONTEXT, *values
        return results.CUDA_ERROR_INVALID_VALUE if self.failing == name else results.CUDA_SUCCESS, *values

    def _is_current(self):
        return bool(self.contexts) and self.contexts[-1] == self.CUcontext(0xC0)

    # --- device, context, stream --------------------------------------------------------------------------------------

    def cuInit(self, flags):
        return self._done("cuInit")

    def cuDriverGetVersion(self):
        return self._done("cuDriverGetVersion", self.version)

    def cuDeviceGet(self, index):
        return self._done("cuDeviceGet", self.CUdevice(index))

    def cuDeviceGetAttribute(self, attribute, device):
        return self._done("cuDeviceGetAttribute", 9 if "MAJOR" in attribute.name else 0)

    def cuDevicePrimaryCtxRetain(self, device):
        return self._done("cuDevicePrimaryCtxRetain", self.CUcontext(0xC0))

    def cuDevicePrimaryCtxRelease(self, device):
        return self._done("cuDevicePrimaryCtxRelease")

    def cuCtxSetCurrent(self, context):
        self.contexts[-1:] = [context]
        return self._done("cuCtxSetCurrent")

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return self._done("cuCtxPushCurrent")

    def cuCtxPopCurrent(self):
        return self._done("cuCtxPopCurrent", self.contexts.pop())

    @property
    def contexts(self):
        """The calling thread's contexts, the current one last."""
        return self._thread.__dict__.setdefault("contexts", [])

    def _has_context(self):
        assert self._capturing is None, "nothing may be given back while work is captured"
        return bool(self.contexts)

    def _is_captured(self, stream):
        return self._capturing is not None and self._capturing[0] == int(stream)

    def cuStreamCreate(self, flags):
        assert flags == int(self.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return self._done("cuStreamCreate", self.CUstream(0x5 + 0x10 * self.calls["cuStreamCreate"]))

    def cuStreamDestroy(self, stream):
        return self._done("cuStreamDestroy")

    def cuStreamSynchronize(self, stream):
        assert not self._is_captured(stream), "a stream that is captured cannot be waited for"
        if not self.contexts:
            return (self.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        return self._done("cuStreamSynchronize")

    def cuEventCreate(self, flags):
        self.events.append(None)
        return self._done("cuEventCreate", self.CUevent(len(self.events)))

    def cuEventDestroy(self, event):
        return self._done("cuEventDestroy")

    def cuEventRecord(self, event, stream):
        assert not self._is_captured(stream), "no body of a conditional node may hold an event"
        self.events[int(event) - 1] = self.time_ms
        self.recorded_on[int(event)] = int(stream)
        return self._done("cuEventRecord")

    def cuEventSynchronize(self, event):
        assert int(event) in self.recorded_on
        return self._done("cuEventSynchronize")

    def cuEventElapsedTime(self, start, end):
        if not self.contexts:
            return self.CUresult.CUDA_ERROR_INVALID_CONTEXT, 0.0
        return self._done("cuEventElapsedTime", self.events[int(end) - 1] - self.events[int(start) - 1])

    def cuStreamWaitEvent(self, stream, event, flags):
        self.waited_for.append(self.recorded_on[int(event)])
        self.held_back.append(int(stream))
        return self._done("cuStreamWaitEvent")

    def cuPointerGetAttribute(self, attribute, address):
        if attribute == self.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            return self._done("cuPointerGetAttribute", self.ordinals.get(address, 0))
        assert attribute == self.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT
        return self._done("cuPointerGetAttribute", self.CUcontext(self.owners.get(address, 0xC0)))

    # --- memory -------------------------------------------------------------------------------------------------------

    def cuMemAlloc(self, n_bytes):
        array = np.full(n_bytes, 0xAB, np.uint8)
        self.memory[array.ctypes.data] = array
        return self._done("cuMemAlloc", self.CUdeviceptr(array.ctypes.data))

    def cuMemHostAlloc(self, n_bytes, flags):
        array = np.full(n_bytes, 0xCD, np.uint8)
        self.host_memory[array.ctypes.data] = array
        return self._done("cuMemHostAlloc", array.ctypes.data)

    def cuMemFreeHost(self, address):
        if not self._has_context():
            return (self.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        del self.host_memory[address]
        return self._done("cuMemFreeHost")

    def cuMemGetInfo(self):
        used = sum(array.nbytes for array in self.memory.values())
        return self._done("cuMemGetInfo", 2**40 - used, 2**40)

    def cuMemFree(self, address):
        if not self._has_context():
            return (self.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        del self.memory[int(address)]
        return self._done("cuMemFree")

    def cuMemsetD8Async(self, address, value, n_bytes, stream):
        self.view(int(address), n_bytes, writes=True)[:] = value
        return self._done("cuMemsetD8Async")

    def view(self, address, n_bytes, *, writes=False):
        """Return that piece of device memory, to read or to write; it must lie within one allocation."""
        for start, array in self.memory.items():
            if start <= address and address + n_bytes <= start + array.nbytes:
                return array[address - start : address - start + n_bytes]
        raise AssertionError(f"{n_bytes} bytes at {address:#x} are not device memory")

    def use(self, thing):
        """Note that work which is enqueued uses a thing of the host, such as an execution context."""

    def forget(self, thing):
        """Note that such a thing is given back."""

    def destroy(self, thing):
        """Give a library's object back: on the GPU whose context is current, without one on GPU 0."""
        self.forget(thing)
        if not self._is_current():
            self.astray.append(type(thing).__name__)

    def cuMemcpyHtoDAsync(self, target, source, n_bytes, stream):
        self._require_host(source, n_bytes)
        self.view(target, n_bytes, writes=True)[:] = np.frombuffer(ctypes.string_at(source, n_bytes), np.uint8)
        return self._copied("HtoD")

    def cuMemcpyDtoHAsync(self, target, source, n_bytes, stream):
        self._require_host(target, n_bytes)
        ctypes.memmove(target, self.view(source, n_bytes).ctypes.data, n_bytes)
        return self._copied("DtoH")

    def cuMemcpyDtoDAsync(self, target, source, n_bytes, stream):
        self.view(target, n_bytes, writes=True)[:] = self.view(source, n_bytes)
        return self._copied("DtoD")

    def _require_host(self, address, n_bytes):
        within = any(
            start <= address and address + n_bytes <= start + a.nbytes for start, a in self.host_memory.items()
        )
        assert within, f"{n_bytes} bytes at {address:#x} are not page-locked"

    def _copied(self, direction):
        self.copies.append(direction)
        self.time_ms += self.copy_ms[direction]
        return self._done(f"cuMemcpy{direction}Async")

"""Tensors in device memory, whatever layout their engines keep them in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np

from engines.base import Buffer
from engines.cuda_device import CudaDevice, CudaEvent, DeviceMemory
from engines.device_array import LEGACY_STREAM, DeviceArray

# numpy has no bfloat16; nobody but an engine reads such an activation
_HOST_DTYPES = {"bfloat16": "uint16"}


class DeviceBuffer:
    """One tensor of a fixed shape, rows (images) one after the other; `first` shares its memory."""

    def __init__(
        self, device: CudaDevice, shape: tuple[int, ...], dtype: str, *, memory: DeviceMemory | None = None
    ) -> None:
        self.shape = shape
        self._dtype = dtype
        self._host_dtype = np.dtype(_HOST_DTYPES.get(dtype, dtype))
        self._row_bytes = prod(shape[1:]) * self._host_dtype.itemsize
        self._device = device
        self._memory = device.allocate(self.n_bytes) if memory is None else memory
        self._host: np.ndarray | None = None  # what goes to and from the device; made when it is first needed
        self._sent: CudaEvent | None = None  # when the last copy from there has arrived

    @property
    def address(self) -> int:
        return self._memory.address

    @property
    def n_bytes(self) -> int:
        return self.shape[0] * self._row_bytes

    def write(self, values: np.ndarray) -> None:
        if values.shape != self.shape:
            raise ValueError(f"got values {list(values.shape)} for a buffer {list(self.shape)}")
        self._device.make_current()  # once a request: it may come in another thread than the one before
        if self._sent is None:
            self._sent = CudaEvent(self._device)
        else:
            self._sent.synchronize()
        host = self._staging()
        host[...] = values
        self._device.upload(self.address, host)
        self._sent.record()

    def copy_from(self, values: DeviceArray) -> None:
        if values.shape != self.shape or values.dtype != self._host_dtype:
            raise ValueError(f"got {values.dtype} {list(values.shape)} for a buffer {self._dtype} {list(self.shape)}")
        self._device.make_current()
        self._device.wait_for(values.stream)
        self._device.copy(self.address, values.address, values.n_bytes)
        self._device.hold_back(values.stream)  # which may give the memory to others next

    def copy_out(self) -> DeviceArray:
        self._device.make_current()
        copy = DeviceBuffer(self._device, self.shape, self._dtype)
        self._device.copy(copy.address, self.address, self.n_bytes)
        return _handed_out(self._device, copy)

    def device_array(self) -> DeviceArray:
        """Return this buffer's own memory as an array, which keeps the buffer alive."""
        stream = int(self._device.stream)
        return DeviceArray(
            address=self.address,
            shape=self.shape,
            dtype=self._host_dtype,
            stream=stream,
            owner=self,
            device=self._device.index,
        )

    def read(self) -> np.ndarray:
        host = self.begin_read()
        self._device.synchronize()
        return host

    def begin_read(self) -> np.ndarray:
        host = self._staging()
        self._device.begin_download(host, self.address)
        return host

    def _staging(self) -> np.ndarray:
        if self._host is None:
            self._host = self._device.host_array(self.shape, self._host_dtype)
        return self._host

    def first(self, n_rows: int) -> Buffer:
        return DeviceBuffer(self._device, (n_rows, *self.shape[1:]), self._dtype, memory=self._memory)

    def gather(self, source: Buffer, rows: np.ndarray) -> None:
        self._move(source, rows, to=np.arange(len(rows)), of=rows)

    def scatter(self, source: Buffer, rows: np.ndarray) -> None:
        self._move(source, rows, to=rows, of=np.arange(len(rows)))

    def copy_rows(self, source: Buffer, rows: np.ndarray) -> None:
        self._move(source, rows, to=rows, of=rows)

    def _move(self, source: Buffer, rows: np.ndarray, *, to: np.ndarray, of: np.ndarray) -> None:
        """Copy rows `of` the source to the rows `to`, one copy for each run of neighbours in `rows`."""
        address = device_buffer(source).address
        starts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        for begin, end in pairwise(starts):
            if begin == end:  # no rows at all
                continue
            here, there = (int(places[begin]) * self._row_bytes for places in (to, of))
            self._device.copy(self.address + here, address + there, (end - begin) * self._row_bytes)


def concatenate(device: CudaDevice, values: Sequence[DeviceArray]) -> DeviceArray:
    """Return arrays that were made on the device's stream as one, rows of one after those of the other."""
    first, n_rows = values[0], sum(len(one) for one in values)
    with device.current():
        result = DeviceBuffer(device, (n_rows, *first.shape[1:]), first.dtype.name)
        target = result.address
        for one in values:
            device.copy(target, one.address, one.n_bytes)
            target += one.n_bytes
        return _handed_out(device, result)


def _handed_out(device: CudaDevice, buffer: DeviceBuffer) -> DeviceArray:
    """Return a buffer whose values are enqueued as an array for others.

    The default stream waits for them: who takes it by `__cuda_array_interface__` should wait for `stream` of it, but
    PyTorch's `as_tensor` and PyCUDA's kernels read the address alone.
    """
    device.hold_back(LEGACY_STREAM)
    return buffer.device_array()


def device_buffer(buffer: Buffer) -> DeviceBuffer:
    if not isinstance(buffer, DeviceBuffer):
        raise TypeError(f"expected a buffer of this backend, got {type(buffer).__name__}")
    return buffer

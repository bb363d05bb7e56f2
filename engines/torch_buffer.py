"""Tensors as buffers of the torch backend, their page-locked host memory, and as arrays on the GPU for others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engines.base import Buffer
from engines.device_array import LEGACY_STREAM, DeviceArray
from engines.device_timer import CopyWatch
from engines.torch_onnx import memory_format
from engines.torch_streams import hold_back, torch_stream, wait_for


class TorchBuffer:
    """A tensor; `first` shares its memory."""

    def __init__(self, tensor: Tensor, copies: CopyWatch) -> None:
        self.tensor = tensor
        self._copies = copies
        self._staging = _Staging(tensor) if tensor.is_cuda else None

    def write(self, values: np.ndarray) -> None:
        if self._staging is None:
            self.tensor.copy_(host_tensor(values))
        else:
            self._copies.run("h2d", self._staging.filled(values).to_device)

    def copy_from(self, values: DeviceArray) -> None:
        device = self.tensor.device
        wait_for(values.stream, device)
        self.tensor.copy_(torch.as_tensor(values, device=device))
        hold_back(values.stream, device)

    def copy_out(self) -> DeviceArray:
        return device_array_of(self.tensor.clone(memory_format=torch.contiguous_format))

    def read(self) -> np.ndarray:
        values = self.begin_read()
        if self._staging is not None:
            torch.cuda.current_stream(self.tensor.device).synchronize()
        return values

    def begin_read(self) -> np.ndarray:
        if self._staging is None:
            return self.tensor.numpy()
        self._copies.run("d2h", self._staging.to_host)
        return self._staging.values()

    def first(self, n_rows: int) -> Buffer:
        return TorchBuffer(self.tensor[:n_rows], self._copies)

    def gather(self, source: Buffer, rows: np.ndarray) -> None:
        self.tensor.copy_(tensor_of(source)[host_tensor(rows).to(self.tensor.device)])

    def scatter(self, source: Buffer, rows: np.ndarray) -> None:
        self.tensor[host_tensor(rows).to(self.tensor.device)] = tensor_of(source)

    def copy_rows(self, source: Buffer, rows: np.ndarray) -> None:
        chosen = host_tensor(rows).to(self.tensor.device)
        self.tensor[chosen] = tensor_of(source)[chosen]


class _Staging:
    """Page-locked host memory for what goes to and from a tensor on a GPU, made when it is first needed.

    Copies of other host memory go through such memory anyway, allocated by PyTorch each time, and are waited for.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._host: Tensor | None = None
        self._sent: torch.cuda.Event | None = None

    def filled(self, values: np.ndarray) -> _Staging:
        """Put values there, once what was sent from there last has arrived."""
        if self._sent is not None:
            self._sent.synchronize()
        self._memory().copy_(host_tensor(values))
        return self

    def to_device(self) -> None:
        self._tensor.copy_(self._memory(), non_blocking=True)
        if self._sent is None:
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._sent.record(torch.cuda.current_stream(self._tensor.device))

    def to_host(self) -> None:
        self._memory().copy_(self._tensor, non_blocking=True)

    def values(self) -> np.ndarray:
        """Return what is there, once the device was waited for; the next copy overwrites it."""
        return self._memory().numpy()

    def _memory(self) -> Tensor:
        if self._host is None:
            self._host = torch.empty_like(self._tensor, device="cpu", pin_memory=True)
        return self._host


def device_array_of(tensor: Tensor) -> DeviceArray:
    """Return a contiguous tensor, made on PyTorch's current stream, as an array on its device for others.

    The default stream waits for it, and its memory for the default stream: who takes it by `__cuda_array_interface__`
    should wait for `stream` of it, but PyCUDA's kernels and PyTorch's `as_tensor` read the address alone.
    """
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    if stream not in (0, LEGACY_STREAM):
        hold_back(LEGACY_STREAM, tensor.device)
        tensor.record_stream(torch_stream(LEGACY_STREAM, tensor.device))
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    return DeviceArray(
        address=tensor.data_ptr(),
        shape=tuple(tensor.shape),
        dtype=dtype,
        stream=stream,
        owner=tensor,
        device=tensor.device.index,
    )


def owned_tensor(values: DeviceArray) -> Tensor:
    assert isinstance(values.owner, Tensor)  # this backend made it
    return values.owner


def memory_order(tensor: Tensor) -> torch.memory_format:
    """Return how a tensor is to lie in memory: feature maps as convolutions want them, pixels as they come."""
    is_map = tensor.dim() == 4 and tensor.is_floating_point()
    return memory_format(tensor.device, tensor.dtype) if is_map else torch.contiguous_format


def host_tensor(values: np.ndarray) -> Tensor:
    """Return a tensor of these values; torch would warn of sharing memory that is read-only."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def tensor_of(buffer: Buffer) -> Tensor:
    if not isinstance(buffer, TorchBuffer):
        raise TypeError(f"expected a buffer of this backend, got {type(buffer).__name__}")
    return buffer.tensor

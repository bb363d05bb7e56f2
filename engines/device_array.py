"""Arrays on the GPU: taken as PyCUDA, CuPy, PyTorch or Numba made them, and given to them.

PyCUDA's `GPUArray`, and most others, say where their memory is by `__cuda_array_interface__` (version 3, documented by
Numba); the rest by DLPack, which PyTorch reads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np

from bdtool.errors import DataError

_DLPACK_CUDA = 2  # DLDeviceType.kDLCUDA
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2  # what the interface, and the driver, call the two default streams


@dataclass(frozen=True, kw_only=True)
class DeviceArray:
    """A C-contiguous array in GPU memory, which `owner` keeps alive.

    `stream` is the one on which its values were, or are being, made; `device` the number of the GPU, where that is
    known, as of what engines give. By `__cuda_array_interface__` PyTorch (`torch.as_tensor`), CuPy (`cupy.asarray`),
    Numba and PyCUDA's kernels take it where it is; by DLPack `from_dlpack` of any library, whose stream waits. What
    engines give the default stream waits for, too; any other must wait for `stream`, which CuPy and Numba see to, and
    PyTorch and PyCUDA do not.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int
    owner: object
    device: int | None = None

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": self.stream or LEGACY_STREAM,  # the interface gives 0 no meaning
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the kind of device, and its number.

        Raises:
            BufferError: it is not known which GPU this is.
        """
        if self.device is None:
            raise BufferError("the number of this array's GPU is not known: take it by __cuda_array_interface__")
        return _DLPACK_CUDA, self.device

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """Return a capsule, which PyTorch makes. `stream`, the caller's, waits for the values; -1: it need not.

        Raises:
            BufferError: as `__dlpack_device__`, or as `torch.Tensor.__dlpack__`, which takes the `options`, too.
        """
        import torch

        from engines.torch_streams import torch_stream

        _, index = self.__dlpack_device__()
        # PyTorch lets the caller's stream wait for its own current one
        with torch.cuda.device(index), torch.cuda.stream(torch_stream(self.stream, index)):
            return torch.as_tensor(self, device=f"cuda:{index}").__dlpack__(stream=stream, **options)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Return neighbouring rows, in the same memory."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"rows of a GPU array are taken by a slice of neighbours; got {rows!r}")
        first, end, _ = rows.indices(len(self))
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(
            address=self.address + first * row_bytes,
            shape=(max(0, end - first), *self.shape[1:]),
            dtype=self.dtype,
            stream=self.stream,
            owner=self.owner,
            device=self.device,
        )


Images = np.ndarray | DeviceArray
Logits = np.ndarray | DeviceArray  # where the images were


class DeviceBufferLike(Protocol):
    """A buffer that takes values which are on its device, and gives its own there."""

    def copy_from(self, values: DeviceArray) -> None:
        """Enqueue a copy of `values`, of the buffer's shape and dtype, after what makes them."""

    def copy_out(self) -> DeviceArray:
        """Return a copy of the content, in memory of its own on the same device; the host does not wait for it."""


@runtime_checkable
class DeviceArrayBackend(Protocol):
    """A backend whose buffers are `DeviceBufferLike`."""

    def check_device_array(self, values: DeviceArray) -> None:
        """Raise DataError unless its device can read the array where it is."""

    def concatenate(self, values: Sequence[DeviceArray]) -> DeviceArray:
        """Return arrays of this backend, rows of one after those of the other, on the device."""


def device_array(values: Any) -> DeviceArray | None:
    """Return `values` as an array on a GPU, or None where it is none.

    Raises:
        DataError: it is one that does not lie C-contiguous, or a tensor that takes part in a gradient.
    """
    try:
        interface = getattr(values, "__cuda_array_interface__", None)
    except RuntimeError as exc:  # PyTorch's, of a tensor that requires a gradient
        raise DataError(f"images: the GPU array cannot be read ({exc}). Pass images.detach()") from exc
    if interface is None and _is_dlpack_on_cuda(values):
        import torch

        values = torch.from_dlpack(values)  # type: ignore[attr-defined]  # public, but not in its list
        interface = values.__cuda_array_interface__
    return None if interface is None else _from_interface({"stream": _torch_stream(values), **interface}, values)


def _torch_stream(values: Any) -> int | None:
    """Return PyTorch's current stream for one of its tensors, whose interface (version 2) names none."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(values, torch.Tensor):
        return None
    return int(torch.cuda.current_stream(values.device).cuda_stream)


def _is_dlpack_on_cuda(values: Any) -> bool:
    ask = getattr(values, "__dlpack_device__", None)
    return ask is not None and ask()[0] == _DLPACK_CUDA


def _from_interface(interface: Mapping[str, Any], owner: object) -> DeviceArray:
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None and not _is_contiguous(shape, strides, dtype):
        raise DataError(
            f"images: the GPU array {list(shape)} has strides {list(strides)}; expected them C-contiguous. Pass a "
            "contiguous copy"
        )
    stream = interface.get("stream")
    # None says that nobody need wait; PyCUDA says so of work on the default stream, too
    return DeviceArray(
        address=int(interface["data"][0]),
        shape=shape,
        dtype=dtype,
        stream=int(stream or LEGACY_STREAM),
        owner=owner,
    )


def _is_contiguous(shape: tuple[int, ...], strides: Sequence[int], dtype: np.dtype[Any]) -> bool:
    """Compare the strides of axes along which there is a step to take."""
    expected = [prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    return all(length == 1 or a == b for length, a, b in zip(shape, strides, expected, strict=True))

"""The NVIDIA driver and its GPUs, asked through the driver's own library, without a package or nvidia-smi."""

import ctypes
import os
from dataclasses import dataclass
from typing import Any

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute in cuda.h


@dataclass(frozen=True)
class Gpu:
    name: str
    compute_capability: tuple[int, int]
    pci_bus_id: str = ""  # "0000:17:00.0": the same GPU for the management library, whose numbers may differ

    @property
    def sm(self) -> int:
        """The compute capability as one number: 89 is 8.9."""
        major, minor = self.compute_capability
        return 10 * major + minor


@dataclass(frozen=True)
class Driver:
    """What libcuda reports; `error` says why its GPUs cannot be used."""

    cuda_version: tuple[int, int] = (0, 0)  # newest CUDA that the driver supports
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None
    installed: bool = True

    @property
    def cuda_text(self) -> str:
        return ".".join(map(str, self.cuda_version))

    @property
    def usable(self) -> bool:
        return bool(self.gpus) and self.error is None


def driver_from_libcuda() -> Driver:
    try:
        libcuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return Driver(installed=False, error="no NVIDIA driver (libcuda not found)")
    return driver_from_calls(libcuda)


def driver_from_calls(libcuda: Any) -> Driver:
    """Return what `libcuda`, or anything with its functions, reports."""
    version, n_gpus = ctypes.c_int(), ctypes.c_int()
    libcuda.cuDriverGetVersion(ctypes.byref(version))
    cuda_version = (version.value // 1000, version.value % 1000 // 10)
    code = libcuda.cuInit(0) or libcuda.cuDeviceGetCount(ctypes.byref(n_gpus))
    if code != 0:
        return Driver(cuda_version, error=f"the driver finds no usable GPU ({_error_name(libcuda, code)})")
    return Driver(cuda_version, tuple(_gpu(libcuda, index) for index in range(n_gpus.value)))


def _gpu(libcuda: Any, index: int) -> Gpu:
    device, major, minor, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    libcuda.cuDeviceGet(ctypes.byref(device), index)
    libcuda.cuDeviceGetName(name, len(name), device)
    libcuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    libcuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    bus = ctypes.create_string_buffer(32)
    libcuda.cuDeviceGetPCIBusId(bus, len(bus), device)
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value), bus.value.decode(errors="replace"))


def _error_name(libcuda: Any, code: int) -> str:
    text = ctypes.c_char_p()
    libcuda.cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {code}"

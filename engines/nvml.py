"""Clocks, temperature and driver of a GPU, asked through the driver's management library, without a package."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

_SM, _MEMORY = 1, 2  # nvmlClockType_t in nvml.h
_GPU_TEMPERATURE = 0  # nvmlTemperatureSensors_t


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """What the GPU does now; None where it does not say."""

    driver_version: str
    sm_mhz: int | None
    max_sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None


def gpu_state(pci_bus_id: str) -> GpuState | None:
    """Return the state of the GPU with that bus id, or None where the library is missing or does not know it."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    except OSError:
        return None
    return state_from_calls(nvml, pci_bus_id)


def state_from_calls(nvml: Any, pci_bus_id: str) -> GpuState | None:
    """Return what `nvml`, or anything with its functions, reports."""
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        device, version = ctypes.c_void_p(), ctypes.create_string_buffer(80)
        if nvml.nvmlDeviceGetHandleByPciBusId_v2(pci_bus_id.encode(), ctypes.byref(device)) != 0:
            return None
        nvml.nvmlSystemGetDriverVersion(version, len(version))
        return GpuState(
            driver_version=version.value.decode(errors="replace"),
            sm_mhz=_number(nvml.nvmlDeviceGetClockInfo, device, _SM),
            max_sm_mhz=_number(nvml.nvmlDeviceGetMaxClockInfo, device, _SM),
            memory_mhz=_number(nvml.nvmlDeviceGetClockInfo, device, _MEMORY),
            temperature_c=_number(nvml.nvmlDeviceGetTemperature, device, _GPU_TEMPERATURE),
        )
    finally:
        nvml.nvmlShutdown()


def _number(ask: Any, device: ctypes.c_void_p, which: int) -> int | None:
    value = ctypes.c_uint()
    return value.value if ask(device, which, ctypes.byref(value)) == 0 else None

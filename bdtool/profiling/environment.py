"""The machine and the versions that a figure was measured with."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from bdtool.version import version
from engines.cpu import cpu_fields, cpu_model, instruction_set
from engines.libcuda import Gpu, driver_from_libcuda
from engines.nvml import GpuState, gpu_state

_SLOW_CLOCK = 0.9  # of the highest: below it, power or heat slows the GPU, or it was idle


def describe_environment(
    *, backend: str, backend_version: str, device: str, threads: int
) -> dict[str, str | int | float]:
    """Return what a reader needs to judge or repeat a measurement."""
    return {
        "cpu": cpu_model(cpu_fields()),
        "instruction_set": instruction_set(),
        "processors_available": len(os.sched_getaffinity(0)),
        "cpu_affinity": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "threads": threads,
        "device": device,
        "backend": f"{backend} {backend_version}",
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "bdtool": version(),
    }


def describe_gpu(device: str) -> dict[str, str | int | float]:
    """Return the GPU behind "cuda:N" and its clocks now; nothing for "cpu", or where the driver does not say."""
    driver = driver_from_libcuda()
    kind, _, index = device.partition(":")
    if kind != "cuda" or int(index) >= len(driver.gpus):
        return {}
    gpu = driver.gpus[int(index)]
    return gpu_figures(gpu, driver.cuda_text, gpu_state(gpu.pci_bus_id))


def gpu_figures(gpu: Gpu, cuda_version: str, state: GpuState | None) -> dict[str, str | int | float]:
    """Return what is known of a GPU: name and versions, MHz and degrees Celsius."""
    known: dict[str, str | int | float | None] = {
        "gpu": gpu.name,
        "gpu_compute_capability": ".".join(map(str, gpu.compute_capability)),
        "driver_cuda": cuda_version,
    }
    if state is not None:
        known |= {
            "driver": state.driver_version,
            "gpu_sm_mhz": state.sm_mhz,
            "gpu_sm_mhz_max": state.max_sm_mhz,
            "gpu_memory_mhz": state.memory_mhz,
            "gpu_temperature_c": state.temperature_c,
        }
    return {name: value for name, value in known.items() if value is not None}


def clock_warnings(gpu: dict[str, str | int | float]) -> list[str]:
    """Return a warning where the GPU's clock at the end of a measurement is well below its highest."""
    now, highest = gpu.get("gpu_sm_mhz"), gpu.get("gpu_sm_mhz_max")
    if not isinstance(now, int) or not isinstance(highest, int) or now >= _SLOW_CLOCK * highest:
        return []
    return [
        f"the GPU's SM clock was {now} MHz at the end, its highest is {highest} MHz: latencies may vary. "
        "Lock it with `nvidia-smi --lock-gpu-clocks`"
    ]

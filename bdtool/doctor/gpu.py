"""The NVIDIA driver, and what its CUDA graphs can do."""

from __future__ import annotations

from bdtool.doctor.finding import Finding, Status
from bdtool.doctor.packages import other_cuda
from bdtool.errors import BackendError
from engines.extras import install_for, is_of_cuda_12
from engines.graph_modes import OFF, PATH_CACHE, SWITCH, graphs_of_machine
from engines.libcuda import Driver
from engines.trt_library import load_library
from engines.trt_options import TENSORRT_RTX
from export.packages import installed_version

_RTX_OF_CUDA_13 = "tensorrt-rtx-cu13-bindings"  # what the extra `rtx` installs; its library brings CUDA 13's runtime


def nvidia_driver(driver: Driver) -> Finding:
    detail = driver_detail(driver)
    if driver.usable:
        return Finding("NVIDIA driver", "ok", detail)
    status: Status = "problem" if driver.installed else "missing"
    return Finding("NVIDIA driver", status, f"{detail}; everything on the CPU works", driver_remedy(driver))


def driver_detail(driver: Driver) -> str:
    if driver.error is not None:
        return driver.error
    gpus = [f"{gpu.name} (compute capability {'.'.join(map(str, gpu.compute_capability))})" for gpu in driver.gpus]
    return f"supports CUDA up to {driver.cuda_text}; {', '.join(gpus) or 'no GPU'}"


def driver_remedy(driver: Driver) -> str:
    if driver.installed:
        return "make a GPU visible (CUDA_VISIBLE_DEVICES, the container's --gpus), or restart after a driver update"
    return "install the NVIDIA driver with the operating system's package manager, if there is an NVIDIA GPU"


def cuda_graphs(driver: Driver) -> Finding:
    """Say how strategy `graph` can run here; see `engines.graph_modes`."""
    name = "CUDA graphs"
    if not driver.usable:
        return Finding(name, "missing", f"{driver_detail(driver)}; only a GPU has them", driver_remedy(driver))
    there = graphs_of_machine(driver, installed_version)
    if SWITCH not in there.missing:
        modes = ", ".join(mode for mode in there.modes if mode != OFF)
        return Finding(name, "ok", f"strategy 'graph' decides on the device; it takes the fastest of {modes}")
    best = there.modes[0]
    how = "reads the policy back for each image" if best == PATH_CACHE else "launches each part"
    reason, _, remedy = there.missing[SWITCH].partition("; ")
    detail = f"{reason}; strategy 'graph' {how} (mode {best})"
    return Finding(name, "problem", detail, remedy.removeprefix("add it with: "))


def rtx_gpu(driver: Driver) -> Finding:
    """Say whether TensorRT-RTX runs on a GPU that is here, with its driver; an H100, for instance, it refuses."""
    name = "GPU for TensorRT-RTX"
    if not driver.usable:
        return Finding(name, "missing", driver_detail(driver), driver_remedy(driver))
    try:
        library = load_library(TENSORRT_RTX)
    except BackendError as exc:
        return Finding(name, "missing", f"not known: {exc}", install_for("rtx", driver))
    known = library.targets()
    fitting = [gpu.name for gpu in driver.gpus if gpu.sm in known]
    if fitting and is_of_cuda_12(driver) and installed_version(_RTX_OF_CUDA_13) is not None:
        detail = f"{_RTX_OF_CUDA_13} needs a driver of CUDA 13, this one {driver_detail(driver)}"
        return Finding(name, "problem", detail, other_cuda(f"{_RTX_OF_CUDA_13} tensorrt-rtx-cu13-libs", "rtx", driver))
    if fitting:
        return Finding(name, "ok", ", ".join(fitting))
    runs_on = ", ".join(f"{sm // 10}.{sm % 10}" for sm in known)
    detail = f"TensorRT-RTX {library.module.__version__} runs on compute capability {runs_on}; {driver_detail(driver)}"
    return Finding(name, "missing", detail, "use --backend torch or tensorrt on this GPU")

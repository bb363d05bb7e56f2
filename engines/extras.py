"""Which of bdtool's extras fits a driver: one of CUDA 12 loads no libraries of CUDA 13."""

from __future__ import annotations

from engines.libcuda import Driver
from export.packages import install_command

_FOR_CUDA_12 = {"cuda": "cuda12", "tensorrt": "tensorrt-cu12", "rtx": "rtx-cu12"}
_CUDA_13 = (13, 0)


def install_for(extra: str, driver: Driver) -> str:
    """Return the command that adds what an extra holds, or its twin for CUDA 12 where the driver needs that."""
    return install_command(_FOR_CUDA_12.get(extra, extra) if is_of_cuda_12(driver) else extra)


def is_of_cuda_12(driver: Driver) -> bool:
    """Say whether there is a GPU, and a driver older than CUDA 13."""
    return driver.usable and driver.cuda_version < _CUDA_13

"""What TensorRT engines are made for: the GPU that builds them, or for TensorRT-RTX the architectures asked for."""

from __future__ import annotations

import re
from dataclasses import replace

from bdtool.errors import BackendError, UsageError
from engines.base import BackendIdentity
from engines.libcuda import Driver, Gpu
from engines.trt_library import installed_version
from engines.trt_options import TENSORRT_RTX, HardwareCompatibility, TensorRTOptions, target_name


def tensorrt_identity(
    backend: str, device: str, options: TensorRTOptions | None, driver: Driver
) -> tuple[BackendIdentity, TensorRTOptions]:
    """Return what engines are made for, and the options with the targets filled in.

    Args:
        options: None takes the defaults, and engines of any settings count as fitting.

    Raises:
        UsageError: TensorRT-RTX without a target, or an option that the library does not have.
        BackendError: not installed, or no GPU where one is needed.
    """
    version = installed_version(backend)
    chosen = options or TensorRTOptions()
    chosen.check_for(backend)
    wider: tuple[str, ...] = ()
    if backend == TENSORRT_RTX:
        if not chosen.sms:
            chosen = replace(chosen, sms=(_target_gpu(backend, device, driver, builds=options is not None).sm,))
        target = target_name(chosen.sms)
    else:
        gpu = _target_gpu(backend, device, driver, builds=options is not None)
        targets = {level: f"{name}-cuda{driver.cuda_text}" for level, name in _names_by_compatibility(gpu).items()}
        target = targets[chosen.hardware_compatibility]
        if options is None:
            wider = tuple(name for level, name in targets.items() if level != "none" and _serves(level, gpu))
    settings = None if options is None else chosen.settings
    identity = BackendIdentity(
        name=backend,
        version=version,
        target=target,
        suffix=".plan",
        settings=settings,
        converts_fp16=True,
        lists_targets=backend == TENSORRT_RTX,
        wider_targets=wider,
        takes_pixels=True,
    )
    return identity, chosen


def _names_by_compatibility(gpu: Gpu) -> dict[HardwareCompatibility, str]:
    """Return what an engine that is built on this GPU is for: by default this model, as others of its capability have
    other numbers of multiprocessors and other memory (TensorRT documentation, "Hardware Compatibility").
    """
    model = re.sub(r"[^\w.]+", "_", gpu.name)
    return {
        "none": f"{target_name((gpu.sm,))}-{model}",
        "same-compute-capability": f"{target_name((gpu.sm,))}-all",
        "ampere-plus": "ampere-plus",
    }


def _serves(level: HardwareCompatibility, gpu: Gpu) -> bool:
    """Say whether engines of that level, built on another GPU, run on this one."""
    return level != "ampere-plus" or gpu.sm >= 80


def _target_gpu(backend: str, device: str, driver: Driver, *, builds: bool) -> Gpu:
    if device == "cpu" and not builds:
        raise UsageError(f"backend {backend!r} runs its engines on a GPU: give --device cuda:0")
    if backend == TENSORRT_RTX and device == "cpu":
        raise UsageError(
            "backend 'tensorrt-rtx': say which GPUs the engines are for, for instance --sm 86,89,120 (no GPU is needed "
            "to build), or --device cuda:0 for the one that is here"
        )
    if device == "cpu":
        raise UsageError(f"backend {backend!r} builds on the GPU that will run its engines: give --device cuda:0")
    index = int(device.partition(":")[2])
    if not driver.usable:
        raise BackendError(
            f"backend {backend!r}, device {device!r}: {driver.error or 'no GPU'}. See `bdtool doctor`"
            + ("; --sm 89 builds without a GPU" if backend == TENSORRT_RTX else "")
        )
    if index >= len(driver.gpus):
        raise UsageError(f"device {device!r}: the driver lists {len(driver.gpus)} GPU(s), cuda:0 is the first")
    return driver.gpus[index]

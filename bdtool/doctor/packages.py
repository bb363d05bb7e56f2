"""The packages that bdtool needs, and those that add to it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bdtool.doctor.finding import Finding, first_line
from engines.extras import install_for, is_of_cuda_12
from engines.libcuda import Driver
from engines.trt_library import DISTRIBUTIONS
from engines.trt_options import TENSORRT, TENSORRT_RTX
from export.packages import installed_version

CORE_MODULES = {
    "torchvision": "torchvision",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "safetensors": "safetensors",
    "Pillow": "PIL",
    "click": "click",
    "rich": "rich",
}


_OF_CUDA_13 = "tensorrt-cu13-bindings"  # which brings the package `tensorrt`, with those beside it
_BESIDE = "tensorrt tensorrt-cu13 tensorrt-cu13-libs"


@dataclass(frozen=True)
class _Extra:
    """An optional package: `adds` says what it is for, `without` what works when it is absent."""

    module: str
    distributions: tuple[str, ...]  # any of these provides the module
    extra: str
    adds: str
    without: str
    needs_driver: bool = False  # importing it opens the driver's library
    note: str = ""  # what else the command needs


EXTRAS = {
    "TensorRT": _Extra(
        "tensorrt",
        DISTRIBUTIONS[TENSORRT],
        "tensorrt",
        "the TensorRT library",
        "onnxruntime works without it",
        note="an NVIDIA GPU and its driver",
    ),
    "TensorRT-RTX": _Extra(
        "tensorrt_rtx_bindings",  # `tensorrt_rtx`, where it is installed, is a name for this
        DISTRIBUTIONS[TENSORRT_RTX],
        "rtx",
        "the TensorRT-RTX library",
        "onnxruntime works without it",
        note="an RTX GPU and its driver to run engines, not to build them",
    ),
    "cuda-bindings": _Extra(
        "cuda.bindings.driver",
        ("cuda-bindings",),
        "cuda",
        "NVIDIA's driver calls from Python",
        "everything on the CPU works without it",
    ),
    "PyCUDA": _Extra(
        "pycuda.driver",
        ("pycuda",),
        "pycuda",
        "for programs that hold PyCUDA arrays",
        "bdtool itself never needs it",
        needs_driver=True,
        note="a C++ compiler, the CUDA toolkit and the NVIDIA driver: it is built from source",
    ),
    "plotly": _Extra(
        "plotly",
        ("plotly",),
        "report",
        "the charts of `bdtool report`",
        "everything but the report works without it",
    ),
    "tensorboard": _Extra(
        "tensorboard",
        ("tensorboard",),
        "train",
        "event files of `bdtool train --tensorboard`",
        "training works without it",
    ),
}


def bdtool_itself() -> Finding:
    version = installed_version("bdtool")
    if version is None:
        detail = "runs from its source folder, not installed: there is no `bdtool` command and no extras"
        return Finding("bdtool", "missing", detail, "pip install -e . (in the folder with pyproject.toml)")
    return Finding("bdtool", "ok", version)


def core_package(name: str) -> Finding:
    module = imported(name, CORE_MODULES[name], distributions=(name,), remedy=f"pip install --force-reinstall {name}")
    return module if isinstance(module, Finding) else Finding(name, "ok", version(module, name))


def torch_package(driver: Driver) -> Finding:
    torch = imported("torch", "torch", distributions=("torch",), remedy="pip install --upgrade torch torchvision")
    if isinstance(torch, Finding):
        return torch
    built_for = torch.version.cuda
    works = torch.cuda.is_available()
    sees = "sees the GPU" if works else "no GPU usable, the CPU works"
    detail = f"{torch.__version__}, {f'built for CUDA {built_for}' if built_for else 'built for the CPU only'}, {sees}"
    if works or not driver.usable:
        return Finding("torch", "ok", detail)
    return Finding("torch", "problem", f"{detail}, though the driver lists one", _torch_remedy(built_for, driver))


def _torch_remedy(built_for: str | None, driver: Driver) -> str:
    supported = driver.cuda_text
    if built_for is None:
        return (
            f"install a torch that is built for CUDA {supported} or older (the selector on pytorch.org shows the line)"
        )
    return f"the driver supports CUDA up to {supported}: update it, or install a torch built for that version"


def _loaded(name: str, its_version: str, driver: Driver) -> Finding:
    if name != "TensorRT" or not is_of_cuda_12(driver) or installed_version(_OF_CUDA_13) is None:
        return Finding(name, "ok", its_version)
    detail = f"{its_version}, for CUDA 13; the driver supports CUDA up to {driver.cuda_text}"
    return Finding(name, "problem", detail, other_cuda(f"{_BESIDE} {_OF_CUDA_13}", "tensorrt", driver))


def other_cuda(installed: str, extra: str, driver: Driver) -> str:
    """Return what to do about packages that are for a newer CUDA than the driver's."""
    return f"update the driver; or: pip uninstall -y {installed}; {install_for(extra, driver)}"


def extra_package(name: str, driver: Driver) -> Finding:
    extra = EXTRAS[name]
    remedy = f"{install_for(extra.extra, driver)} ({extra.adds}{f'; needs {extra.note}' if extra.note else ''})"
    module = imported(name, extra.module, distributions=extra.distributions, remedy=remedy)
    if not isinstance(module, Finding):
        return _loaded(name, version(module, *extra.distributions), driver)
    if module.status == "missing":
        return Finding(name, "missing", f"not installed; {extra.without}", remedy)
    if extra.needs_driver and not driver.installed:
        return Finding(name, "problem", module.detail, "install the NVIDIA driver: this package cannot load without it")
    return module


def imported(name: str, module: str, *, distributions: tuple[str, ...], remedy: str) -> ModuleType | Finding:
    """Import `module`; a Finding says that it is missing, or installed and broken."""
    try:
        return _with_files(importlib.import_module(module))
    except Exception as exc:  # a broken package can raise anything while it is imported
        absent = isinstance(exc, ModuleNotFoundError) and module.startswith(exc.name or "?")
        if absent and not any(installed_version(distribution) for distribution in distributions):
            return Finding(name, "missing", "not installed", remedy)
        return Finding(name, "problem", f"cannot be imported: {first_line(exc)}", remedy)


def _with_files(module: ModuleType) -> ModuleType:
    """Give a module back, unless it is any folder of that name, such as one in which a removed package left its caches.

    Raises:
        ModuleNotFoundError: it is.
    """
    if getattr(module, "__file__", None) is None and hasattr(module, "__path__"):
        places = ", ".join(map(str, module.__path__))
        raise ModuleNotFoundError(f"nothing to import in {places}", name=module.__name__)
    return module


def version(module: Any, *distributions: str) -> str:
    found = (installed_version(distribution) for distribution in distributions)
    return next((version for version in found if version), str(getattr(module, "__version__", "version unknown")))

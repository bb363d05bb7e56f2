"""What of bdtool works on this machine, and the command that adds what does not.

Every probe survives a missing or broken package: that is what it is there to report.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from engines.graph_modes import OFF, PATH_CACHE, SWITCH, graphs_of_machine
from engines.libcuda import Driver, driver_from_libcuda

Status = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one probe saw. `remedy` is a command or one sentence; None where nothing needs doing."""

    name: str
    status: Status
    detail: str
    remedy: str | None = None


# What a user wants to do, and the findings that must be ok for it.
ABILITIES: dict[str, tuple[str, ...]] = {
    "import, train and evaluate a MODEL": ("torch", "torchvision", "safetensors", "Pillow"),
    "export": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "build and run on the CPU": ("onnxruntime", "numpy", "Pillow"),
    "build and run on the GPU (onnxruntime)": ("onnxruntime", "onnxruntime on CUDA"),
    "build and run on the GPU (onnxruntime-tensorrt)": (
        "onnxruntime",
        "onnxruntime on CUDA",
        "onnxruntime on TensorRT",
    ),
    "build TensorRT-RTX engines (without a GPU)": ("onnx", "TensorRT-RTX"),
    "run TensorRT-RTX engines": ("TensorRT-RTX", "NVIDIA driver", "cuda-bindings"),
    "build and run TensorRT engines": ("onnx", "TensorRT", "NVIDIA driver", "cuda-bindings"),
    "CUDA graphs that decide on the device (strategy graph)": ("NVIDIA driver", "cuda-bindings", "CUDA graphs"),
    "report": ("onnxruntime", "plotly"),
    "demo": ("torch", "onnx", "onnxscript", "onnxruntime", "plotly"),
}


def examine() -> list[Finding]:
    """Look at this machine, from the interpreter to the GPU; nothing is changed or downloaded."""
    driver = driver_from_libcuda()
    probes: list[tuple[str, Callable[[], Finding]]] = [
        ("Python", _python),
        ("operating system", _operating_system),
        ("processor", _processor),
        ("bdtool", _bdtool),
        ("torch", partial(_torch, driver)),
        *((name, partial(_core_package, name)) for name in _CORE_MODULES),
        ("onnxruntime", _onnxruntime),
        ("onnxruntime on CUDA", partial(_onnxruntime_gpu, "CUDA", driver)),
        ("onnxruntime on TensorRT", partial(_onnxruntime_gpu, "TensorRT", driver)),
        ("onnxruntime packages", _onnxruntime_packages),
        ("NVIDIA driver", partial(_nvidia_driver, driver)),
        ("CUDA graphs", partial(_cuda_graphs, driver)),
        *((name, partial(_extra_package, name, driver)) for name in _EXTRAS),
    ]
    return [_guarded(name, probe) for name, probe in probes]


def render(findings: Sequence[Finding]) -> str:
    """Return the findings as plain text, each remedy below its finding, then what works and what does not."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.name:<{width}}  {finding.detail}")
        if finding.remedy is not None:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    return "\n".join([*lines, "", *_ability_lines(findings)])


def _ability_lines(findings: Sequence[Finding]) -> Iterator[str]:
    ok = {finding.name for finding in findings if finding.status == "ok"}
    yield "What works here:"
    for ability, needed in ABILITIES.items():
        lacking = [name for name in needed if name not in ok]
        yield f"  no   {ability} (needs {', '.join(lacking)})" if lacking else f"  yes  {ability}"


def _guarded(name: str, probe: Callable[[], Finding]) -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of an old driver; the finding says so
            return probe()
    except Exception as exc:  # a broken package can raise anything while it is imported
        return Finding(name, "problem", _first_line(exc), "report this: the probe itself failed")


# --- the machine ------------------------------------------------------------------------------------------------------


def _python() -> Finding:
    detail = f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    return Finding("Python", "ok", detail)


def _operating_system() -> Finding:
    detail = platform.platform()
    if os.name != "posix":
        return Finding("operating system", "problem", f"{detail}: bdtool needs POSIX file locks", "use Linux or WSL 2")
    return Finding("operating system", "ok", detail)


# The instruction sets that decide how fast fp32 and int8 convolutions run on a CPU.
_INSTRUCTION_SETS = (
    *("sse4_2", "avx", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    fields = _cpuinfo_fields(cpuinfo)
    model = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    known = [name for name in _INSTRUCTION_SETS if name in flags]
    cores = f"{_n_cores():g} of {os.cpu_count()} cores available"
    return Finding("processor", "ok", f"{model}; {cores}; {' '.join(known) or 'instruction sets not listed'}")


def _cpuinfo_fields(cpuinfo: Path) -> dict[str, str]:
    """Return the fields of the first processor; none where the system has no such file."""
    if not cpuinfo.is_file():
        return {}
    first_processor = cpuinfo.read_text(errors="replace").strip().split("\n\n")[0]
    pairs = (line.partition(":") for line in first_processor.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _n_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Return the cores this process may use: its affinity, or less where a container has a quota (cgroup v2)."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
        return min(n_cores, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return n_cores


# --- packages ---------------------------------------------------------------------------------------------------------

_CORE_MODULES = {
    "torchvision": "torchvision",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "safetensors": "safetensors",
    "Pillow": "PIL",
    "click": "click",
    "rich": "rich",
}


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


_EXTRAS = {
    "TensorRT": _Extra(
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
        "tensorrt",
        "the TensorRT library",
        "onnxruntime works without it",
        note="an NVIDIA GPU and its driver",
    ),
    "TensorRT-RTX": _Extra(
        "tensorrt_rtx_bindings",  # `tensorrt_rtx`, where it is installed, is a name for this
        ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx"),
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


def _bdtool() -> Finding:
    version = _installed_version("bdtool")
    if version is None:
        detail = "runs from its source folder, not installed: there is no `bdtool` command and no extras"
        return Finding("bdtool", "missing", detail, "pip install -e . (in the folder with pyproject.toml)")
    return Finding("bdtool", "ok", version)


def _core_package(name: str) -> Finding:
    module = _imported(name, _CORE_MODULES[name], distributions=(name,), remedy=f"pip install --force-reinstall {name}")
    return module if isinstance(module, Finding) else Finding(name, "ok", _version(module, name))


def _torch(driver: Driver) -> Finding:
    torch = _imported("torch", "torch", distributions=("torch",), remedy="pip install --upgrade torch torchvision")
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


def _extra_package(name: str, driver: Driver) -> Finding:
    extra = _EXTRAS[name]
    command = f'pip install "bdtool[{extra.extra}]"'
    remedy = f"{command} ({extra.adds}{f'; needs {extra.note}' if extra.note else ''})"
    module = _imported(name, extra.module, distributions=extra.distributions, remedy=remedy)
    if not isinstance(module, Finding):
        return Finding(name, "ok", _version(module, *extra.distributions))
    if module.status == "missing":
        return Finding(name, "missing", f"not installed; {extra.without}", remedy)
    if extra.needs_driver and not driver.installed:
        return Finding(name, "problem", module.detail, "install the NVIDIA driver: this package cannot load without it")
    return module


def _imported(name: str, module: str, *, distributions: tuple[str, ...], remedy: str) -> ModuleType | Finding:
    """Import `module`; a Finding says that it is missing, or installed and broken."""
    try:
        return importlib.import_module(module)
    except Exception as exc:  # a broken package can raise anything while it is imported
        absent = isinstance(exc, ModuleNotFoundError) and module.startswith(exc.name or "?")
        if absent and not any(_installed_version(distribution) for distribution in distributions):
            return Finding(name, "missing", "not installed", remedy)
        return Finding(name, "problem", f"cannot be imported: {_first_line(exc)}", remedy)


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _version(module: Any, *distributions: str) -> str:
    found = (_installed_version(distribution) for distribution in distributions)
    return next((version for version in found if version), str(getattr(module, "__version__", "version unknown")))


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__


# --- onnxruntime ------------------------------------------------------------------------------------------------------

_ORT_GPU = 'pip install "onnxruntime-gpu>=1.23"'
_ORT_CLEAN = f"pip uninstall -y onnxruntime onnxruntime-gpu && {_ORT_GPU}"


def _onnxruntime() -> Finding:
    ort = _imported("onnxruntime", "onnxruntime", distributions=("onnxruntime-gpu", "onnxruntime"), remedy=_ORT_CLEAN)
    if isinstance(ort, Finding):
        return ort
    if not hasattr(ort, "InferenceSession"):  # the files of two packages mixed, or an empty folder left behind
        return Finding("onnxruntime", "problem", "it imports, but is incomplete", _ORT_CLEAN)
    return Finding("onnxruntime", "ok", f"{ort.__version__}; {', '.join(ort.get_available_providers())}")


# By title: the provider, and what makes its libraries available.
_GPU_PROVIDERS = {
    "CUDA": (
        "CUDAExecutionProvider",
        "make its CUDA and cuDNN major versions available (`pip install onnxruntime-gpu[cuda,cudnn]`)",
    ),
    "TensorRT": ("TensorrtExecutionProvider", 'pip install "tensorrt>=10.13,<11" (it is linked with TensorRT 10)'),
}


def _onnxruntime_gpu(title: str, driver: Driver) -> Finding:
    """Say whether a session on the GPU can really be created; a listed provider may still fail to load."""
    name = f"onnxruntime on {title}"
    provider, remedy = _GPU_PROVIDERS[title]
    ort = _imported(name, "onnxruntime", distributions=("onnxruntime-gpu", "onnxruntime"), remedy=_ORT_GPU)
    if isinstance(ort, Finding):
        return ort
    if provider not in ort.get_available_providers():
        return Finding(name, "missing", f"this onnxruntime has no {title} provider; the CPU works", _ORT_CLEAN)
    if not driver.usable:  # asking onnxruntime would only print its own errors
        return Finding(name, "missing", f"{_driver_detail(driver)}; the CPU provider works", _driver_remedy(driver))
    error = _session_error(ort, provider)
    if error is not None:
        return Finding(name, "problem", f"{error}; the CPU provider works", remedy)
    return Finding(name, "ok", "a session runs on the GPU")


def _session_error(ort: Any, provider: str) -> str | None:
    """Create a one-node session on the GPU; return why it could not be, or None."""
    try:
        from onnx import TensorProto, helper

        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds the CUDA libraries that pip installed
        if provider == "TensorrtExecutionProvider":
            with contextlib.suppress(ImportError, OSError):  # likewise; what the system has may still do
                importlib.import_module("tensorrt_libs")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    except Exception as exc:  # whatever stops the session is the finding
        return _first_line(exc)
    used = session.get_providers()
    return None if provider in used else f"the session fell back to {', '.join(used)}"


def _onnxruntime_packages() -> Finding:
    """Two packages write the same folder: the one installed last wins, and removing either breaks the other."""
    name = "onnxruntime packages"
    known = ("onnxruntime", "onnxruntime-gpu")
    installed = [f"{package} {version}" for package in known if (version := _installed_version(package))]
    if len(installed) > 1:
        return Finding(name, "problem", f"{' and '.join(installed)} overwrite each other", _ORT_CLEAN)
    if not installed:
        return Finding(name, "missing", "neither onnxruntime-gpu nor onnxruntime is installed", _ORT_GPU)
    return Finding(name, "ok", f"only {installed[0]}")


# --- the NVIDIA driver ------------------------------------------------------------------------------------------------


def _nvidia_driver(driver: Driver) -> Finding:
    detail = _driver_detail(driver)
    if driver.usable:
        return Finding("NVIDIA driver", "ok", detail)
    status: Status = "problem" if driver.installed else "missing"
    return Finding("NVIDIA driver", status, f"{detail}; everything on the CPU works", _driver_remedy(driver))


def _driver_detail(driver: Driver) -> str:
    if driver.error is not None:
        return driver.error
    gpus = [f"{gpu.name} (compute capability {'.'.join(map(str, gpu.compute_capability))})" for gpu in driver.gpus]
    return f"supports CUDA up to {driver.cuda_text}; {', '.join(gpus) or 'no GPU'}"


def _driver_remedy(driver: Driver) -> str:
    if driver.installed:
        return "make a GPU visible (CUDA_VISIBLE_DEVICES, the container's --gpus), or restart after a driver update"
    return "install the NVIDIA driver with the operating system's package manager, if there is an NVIDIA GPU"


def _cuda_graphs(driver: Driver) -> Finding:
    """Say how strategy `graph` can run here; see `engines.graph_modes`."""
    name = "CUDA graphs"
    if not driver.usable:
        return Finding(name, "missing", f"{_driver_detail(driver)}; only a GPU has them", _driver_remedy(driver))
    there = graphs_of_machine(driver, lambda distribution: _installed_version(distribution) is not None)
    if not there.missing:
        modes = ", ".join(mode for mode in there.modes if mode != OFF)
        return Finding(name, "ok", f"strategy 'graph' decides on the device; it takes the fastest of {modes}")
    best = there.modes[0]
    how = "reads the policy back for each image" if best == PATH_CACHE else "launches each part"
    reason, _, remedy = there.missing[SWITCH].partition("; ")
    detail = f"{reason}; strategy 'graph' {how} (mode {best})"
    return Finding(name, "problem", detail, remedy.removeprefix("add it with: "))

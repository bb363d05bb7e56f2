"""Every probe, and what their findings mean. A probe survives a missing or broken package: it is there to report it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bdtool.doctor.finding import Finding, first_line
from bdtool.doctor.gpu import cuda_graphs, nvidia_driver, rtx_gpu
from bdtool.doctor.machine import operating_system, processor, python
from bdtool.doctor.onnxruntime import both_packages, gpu_provider, onnxruntime_package
from bdtool.doctor.packages import CORE_MODULES, EXTRAS, bdtool_itself, core_package, extra_package, torch_package
from engines.libcuda import driver_from_libcuda

# What a user wants to do, and the findings that must be ok for it.
ABILITIES: dict[str, tuple[str, ...]] = {
    "import, train and evaluate a MODEL": ("torch", "torchvision", "safetensors", "Pillow"),
    "export": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "build and run on the CPU": ("onnxruntime", "numpy", "Pillow"),
    "build and run on the GPU (torch)": ("torch", "onnx", "onnxruntime", "NVIDIA driver"),
    "build and run on the GPU (onnxruntime)": ("onnxruntime", "onnxruntime on CUDA"),
    "build and run on the GPU (onnxruntime-tensorrt)": (
        "onnxruntime",
        "onnxruntime on CUDA",
        "onnxruntime on TensorRT",
    ),
    "build TensorRT-RTX engines (without a GPU)": ("onnx", "TensorRT-RTX"),
    "run TensorRT-RTX engines": ("TensorRT-RTX", "GPU for TensorRT-RTX", "cuda-bindings"),
    "build and run TensorRT engines": ("onnx", "TensorRT", "NVIDIA driver", "cuda-bindings"),
    "CUDA graphs that decide on the device (strategy graph)": ("NVIDIA driver", "cuda-bindings", "CUDA graphs"),
    "report": ("onnxruntime", "plotly"),
    "demo": ("torch", "onnx", "onnxscript", "onnxruntime", "plotly"),
}


def examine() -> list[Finding]:
    """Look at this machine, from the interpreter to the GPU; nothing is changed or downloaded."""
    driver = driver_from_libcuda()
    probes: list[tuple[str, Callable[[], Finding]]] = [
        ("Python", python),
        ("operating system", operating_system),
        ("processor", processor),
        ("bdtool", bdtool_itself),
        ("torch", partial(torch_package, driver)),
        *((name, partial(core_package, name)) for name in CORE_MODULES),
        ("onnxruntime", onnxruntime_package),
        ("onnxruntime on CUDA", partial(gpu_provider, "CUDA", driver)),
        ("onnxruntime on TensorRT", partial(gpu_provider, "TensorRT", driver)),
        ("onnxruntime packages", both_packages),
        ("NVIDIA driver", partial(nvidia_driver, driver)),
        ("CUDA graphs", partial(cuda_graphs, driver)),
        ("GPU for TensorRT-RTX", partial(rtx_gpu, driver)),
        *((name, partial(extra_package, name, driver)) for name in EXTRAS),
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
        return Finding(name, "problem", first_line(exc), "report this: the probe itself failed")

"""ONNX Runtime and its providers for a GPU."""

from __future__ import annotations

from types import ModuleType

from bdtool.doctor.finding import Finding, first_line
from bdtool.doctor.gpu import driver_detail, driver_remedy
from bdtool.doctor.packages import imported
from engines.libcuda import Driver
from export.packages import installed_version

_ORT_GPU = 'pip install "onnxruntime-gpu>=1.25"'
_ORT_CLEAN = f"pip uninstall -y onnxruntime onnxruntime-gpu && {_ORT_GPU}"


def onnxruntime_package() -> Finding:
    ort = _complete("onnxruntime", remedy=_ORT_CLEAN)
    if isinstance(ort, Finding):
        return ort
    return Finding("onnxruntime", "ok", f"{ort.__version__}; {', '.join(ort.get_available_providers())}")


def _complete(name: str, *, remedy: str) -> ModuleType | Finding:
    ort = imported(name, "onnxruntime", distributions=("onnxruntime-gpu", "onnxruntime"), remedy=remedy)
    if isinstance(ort, ModuleType) and not hasattr(ort, "InferenceSession"):  # the files of two packages mixed
        return Finding(name, "problem", "it imports, but is incomplete", _ORT_CLEAN)
    return ort


# By title: the provider, and what makes its libraries available.
_GPU_PROVIDERS = {
    "CUDA": (
        "CUDAExecutionProvider",
        "make its CUDA and cuDNN major versions available",
    ),
    "TensorRT": ("TensorrtExecutionProvider", 'pip install "tensorrt>=10.13,<11" (it is linked with TensorRT 10)'),
}


def gpu_provider(title: str, driver: Driver) -> Finding:
    """Say whether a session on the GPU can really be created; a listed provider may still fail to load."""
    name = f"onnxruntime on {title}"
    provider, remedy = _GPU_PROVIDERS[title]
    ort = _complete(name, remedy=_ORT_GPU)
    if isinstance(ort, Finding):
        return ort
    if provider not in ort.get_available_providers():
        return Finding(name, "missing", f"this onnxruntime has no {title} provider; the CPU works", _ORT_CLEAN)
    if not driver.usable:  # asking onnxruntime would only print its own errors
        return Finding(name, "missing", f"{driver_detail(driver)}; the CPU provider works", driver_remedy(driver))
    from engines.onnxrt_providers import CUDA, cuda_install

    error = _session_error(provider)
    if error is not None:
        remedy += f" (`{cuda_install(driver)}`)" if provider == CUDA else ""
        return Finding(name, "problem", f"{error}; the CPU provider works", remedy)
    return Finding(name, "ok", "a session runs on the GPU")


def _session_error(provider: str) -> str | None:
    """Create a one-node session on the GPU; return why it could not be, or None."""
    try:
        from onnx import TensorProto, helper

        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        from engines.onnxrt_providers import FATAL_ONLY, load_libraries, open_session
        from export.ort_threads import any_threads_options

        load_libraries(tensorrt=provider == "TensorrtExecutionProvider")
        options = any_threads_options()
        options.log_severity_level = FATAL_ONLY  # what it says is the finding
        session = open_session(model.SerializeToString(), options, [provider], severity=FATAL_ONLY)
    except Exception as exc:  # whatever stops the session is the finding
        return first_line(exc)
    used = session.get_providers()
    return None if provider in used else f"the session fell back to {', '.join(used)}"


def both_packages() -> Finding:
    """Two packages write the same folder: the one installed last wins, and removing either breaks the other."""
    name = "onnxruntime packages"
    known = ("onnxruntime", "onnxruntime-gpu")
    installed = [f"{package} {version}" for package in known if (version := installed_version(package))]
    if len(installed) > 1:
        return Finding(name, "problem", f"{' and '.join(installed)} overwrite each other", _ORT_CLEAN)
    if not installed:
        return Finding(name, "missing", "neither onnxruntime-gpu nor onnxruntime is installed", _ORT_GPU)
    return Finding(name, "ok", f"only {installed[0]}")

"""`bdtool doctor` reports; it never fails because of what it finds."""

import ctypes
import importlib
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest

from bdtool.doctor import examination, gpu, machine, onnxruntime, packages
from bdtool.doctor.examination import examine, render
from bdtool.doctor.finding import Finding
from engines import onnxrt_providers  # noqa: F401  # before a stand-in takes the place of ONNX Runtime for a test
from engines.libcuda import Driver, Gpu, driver_from_calls, driver_from_libcuda
from export.packages import install_command
from export.processors import n_processors

NO_DRIVER = Driver(installed=False, error="no NVIDIA driver (libcuda not found)")
ONE_GPU = Driver((13, 0), (Gpu("NVIDIA H200", (9, 0)),))


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Installed distributions, as the test fills them in."""
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    return installed


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with a module name and code: an import of that name then runs that code, instead of what is installed."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(module: str, code: str) -> None:
        (tmp_path / f"{module}.py").write_text(code)
        for loaded in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, loaded)
        importlib.invalidate_caches()

    yield write
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_examine_reports_every_subject_once() -> None:
    names = [finding.name for finding in examine()]
    assert len(names) == len(set(names))
    needed = {name for ability in examination.ABILITIES.values() for name in ability}
    assert needed <= set(names)


def test_everything_but_ok_has_a_remedy() -> None:
    assert [finding for finding in examine() if finding.status != "ok" and not finding.remedy] == []


def test_the_core_packages_are_ok_here() -> None:
    found = {finding.name: finding for finding in examine()}
    for name in ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy", "Pillow"):
        assert found[name].status == "ok", found[name]
    assert "CPUExecutionProvider" in found["onnxruntime"].detail


def test_a_missing_extra_shows_its_pip_line(versions: dict[str, str], importable: Any) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'tensorrt_rtx_bindings'\", name='tensorrt_rtx_bindings')"
    importable("tensorrt_rtx_bindings", missing)
    finding = packages.extra_package("TensorRT-RTX", NO_DRIVER)
    assert finding.status == "missing"
    assert finding.remedy is not None
    assert install_command("rtx") in finding.remedy
    assert "works without it" in finding.detail


@pytest.mark.parametrize(
    ("name", "module", "extra", "of_cuda_12"),
    [
        ("cuda-bindings", "cuda", "cuda", "cuda12"),
        ("TensorRT", "tensorrt", "tensorrt", "tensorrt-cu12"),
        ("TensorRT-RTX", "tensorrt_rtx_bindings", "rtx", "rtx-cu12"),
    ],
)
def test_a_driver_of_cuda_12_takes_packages_of_cuda_12(
    importable: Any, versions: dict[str, str], name: str, module: str, extra: str, of_cuda_12: str
) -> None:
    importable(module, f"raise ModuleNotFoundError('no module', name='{module}')")
    for cuda, which in (((12, 9), of_cuda_12), ((13, 0), extra)):
        finding = packages.extra_package(name, Driver(cuda, ONE_GPU.gpus))
        assert finding.remedy is not None
        assert install_command(which) in finding.remedy


def test_tensorrt_for_cuda_13_does_not_run_with_a_driver_of_cuda_12(importable: Any, versions: dict[str, str]) -> None:
    importable("tensorrt", "__version__ = '11.4.0'")
    versions["tensorrt-cu13-bindings"] = "11.4.0"
    assert packages.extra_package("TensorRT", ONE_GPU).status == "ok"
    finding = packages.extra_package("TensorRT", Driver((12, 9), ONE_GPU.gpus))
    assert (finding.status, finding.detail) == ("problem", "11.4.0, for CUDA 13; the driver supports CUDA up to 12.9")
    assert finding.remedy == (
        "update the driver; or: pip uninstall -y tensorrt tensorrt-cu13 tensorrt-cu13-libs tensorrt-cu13-bindings; "
        f"{install_command('tensorrt-cu12')}"
    )
    del versions["tensorrt-cu13-bindings"]
    assert packages.extra_package("TensorRT", Driver((12, 9), ONE_GPU.gpus)).status == "ok"


def test_a_broken_package_is_a_problem_with_its_words(versions: dict[str, str], importable: Any) -> None:
    versions["tensorrt"] = "10.13"
    importable("tensorrt", "raise OSError('libnvinfer.so.10: cannot open shared object file')")
    finding = packages.extra_package("TensorRT", NO_DRIVER)
    assert finding.status == "problem"
    assert "OSError: libnvinfer.so.10: cannot open" in finding.detail


def test_a_package_whose_own_dependency_is_missing_is_a_problem(versions: dict[str, str], importable: Any) -> None:
    versions["tensorboard"] = "2.20"
    importable("tensorboard", "import a_module_that_nobody_has")
    finding = packages.extra_package("tensorboard", NO_DRIVER)
    assert finding.status == "problem"
    assert "a_module_that_nobody_has" in finding.detail


def test_pycuda_without_a_driver_asks_for_the_driver(versions: dict[str, str], importable: Any) -> None:
    versions["pycuda"] = "2026.1"
    importable("pycuda", "raise ImportError('libcuda.so.1: cannot open shared object file')")
    finding = packages.extra_package("PyCUDA", NO_DRIVER)
    assert finding.remedy is not None
    assert "NVIDIA driver" in finding.remedy


def test_a_gpu_that_tensorrt_rtx_refuses_is_named() -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    finding = gpu.rtx_gpu(ONE_GPU)
    assert finding.status == "missing"
    assert re.search(
        r"runs on compute capability .*8\.9, 12\.0.*NVIDIA H200 \(compute capability 9\.0\)", finding.detail
    )
    assert finding.remedy == "use --backend torch or tensorrt on this GPU"
    both = Driver((13, 0), (*ONE_GPU.gpus, Gpu("NVIDIA L4", (8, 9))))
    assert gpu.rtx_gpu(both) == Finding("GPU for TensorRT-RTX", "ok", "NVIDIA L4")
    assert gpu.rtx_gpu(NO_DRIVER).status == "missing"


def test_tensorrt_rtx_for_cuda_13_does_not_run_with_a_driver_of_cuda_12(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setattr(gpu, "installed_version", {"tensorrt-rtx-cu13-bindings": "1.7.1.116"}.get)
    old = Driver((12, 9), (Gpu("NVIDIA L4", (8, 9)),))
    finding = gpu.rtx_gpu(old)
    assert finding.status == "problem"
    assert finding.detail.startswith(
        "tensorrt-rtx-cu13-bindings needs a driver of CUDA 13, this one supports CUDA up to 12.9"
    )
    assert finding.remedy is not None
    assert finding.remedy.endswith(install_command("rtx-cu12"))
    monkeypatch.setattr(gpu, "installed_version", lambda name: None)  # the one for CUDA 12 instead
    assert gpu.rtx_gpu(old).status == "ok"


def test_a_gpu_for_tensorrt_rtx_is_not_known_without_its_library(versions: dict[str, str]) -> None:
    finding = gpu.rtx_gpu(ONE_GPU)
    assert (finding.status, finding.remedy) == ("missing", install_command("rtx"))
    assert "is not installed" in finding.detail


def test_a_probe_that_fails_becomes_a_finding() -> None:
    def probe() -> Finding:
        raise RuntimeError("boom\nsecond line")

    assert examination._guarded("x", probe).detail == "RuntimeError: boom"


def test_both_onnxruntime_packages_are_a_problem(versions: dict[str, str]) -> None:
    versions.update({"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.1"})
    finding = onnxruntime.both_packages()
    assert finding.status == "problem"
    assert "onnxruntime 1.30.0 and onnxruntime-gpu 1.31.1" in finding.detail
    assert finding.remedy is not None
    assert finding.remedy.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")


def test_one_onnxruntime_package_is_ok(versions: dict[str, str]) -> None:
    versions["onnxruntime-gpu"] = "1.31.1"
    assert onnxruntime.both_packages() == Finding("onnxruntime packages", "ok", "only onnxruntime-gpu 1.31.1")


def test_cuda_provider_without_a_driver_is_missing_and_silent(capfd: pytest.CaptureFixture[str]) -> None:
    finding = onnxruntime.gpu_provider("CUDA", NO_DRIVER)
    assert finding.status == "missing"
    assert "the CPU" in finding.detail
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("title", "remedy"), [("CUDA", "onnxruntime-gpu[cuda,cudnn]"), ("TensorRT", "tensorrt>=10.13,<11")]
)
def test_gpu_provider_that_falls_back_is_a_problem(monkeypatch: pytest.MonkeyPatch, title: str, remedy: str) -> None:
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *arguments, **options: session)
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    finding = onnxruntime.gpu_provider(title, ONE_GPU)
    assert finding.status == "problem"
    assert "fell back to CPUExecutionProvider" in finding.detail
    assert finding.remedy is not None
    assert remedy in finding.remedy


@pytest.mark.parametrize(("title", "reason"), [("CUDA", "fell back to"), ("TensorRT", "TensorRT libraries")])
def test_gpu_provider_that_does_not_load_says_why_and_prints_nothing(
    capfd: pytest.CaptureFixture[str], title: str, reason: str
) -> None:
    """By the library that is installed, which finds neither a driver nor TensorRT 10."""
    if onnxruntime._GPU_PROVIDERS[title][0] not in ort.get_available_providers() or driver_from_libcuda().installed:
        pytest.skip("needs onnxruntime-gpu, and a machine without an NVIDIA driver")
    finding = onnxruntime.gpu_provider(title, ONE_GPU)
    assert finding.status == "problem"
    assert reason in finding.detail
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("installed", "status"), [({}, "missing"), ({"left_behind": "1.0"}, "problem")])
def test_folder_that_a_package_left_behind_is_not_the_package(
    versions: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], status: str
) -> None:
    """Python imports it without an error: a package of nothing."""
    versions |= installed
    (tmp_path / "left_behind" / "__pycache__").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    finding = packages.imported("it", "left_behind", distributions=("left_behind",), remedy="pip install it")
    sys.modules.pop("left_behind")
    assert isinstance(finding, Finding)
    assert (finding.status, finding.remedy) == (status, "pip install it")


def test_incomplete_onnxruntime_is_no_fault_of_the_probes(importable: Any) -> None:
    importable("onnxruntime", "")
    findings = [onnxruntime.onnxruntime_package(), onnxruntime.gpu_provider("CUDA", ONE_GPU)]
    for finding in findings:
        assert (finding.status, finding.detail) == ("problem", "it imports, but is incomplete")
        assert finding.remedy is not None
        assert "pip uninstall -y onnxruntime onnxruntime-gpu" in finding.remedy


def test_onnxruntime_whose_cuda_provider_runs_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    session = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *arguments, **options: session)
    monkeypatch.setattr(ort, "get_available_providers", session.get_providers)
    assert onnxruntime.gpu_provider("CUDA", ONE_GPU).status == "ok"


def test_onnxruntime_without_a_tensorrt_provider_says_so(importable: Any) -> None:
    importable("onnxruntime", "InferenceSession = None\ndef get_available_providers(): return ['CPUExecutionProvider']")
    finding = onnxruntime.gpu_provider("TensorRT", ONE_GPU)
    assert (finding.status, finding.detail[:44]) == ("missing", "this onnxruntime has no TensorRT provider; t")


def test_a_torch_without_cuda_beside_a_gpu_is_a_problem(importable: Any) -> None:
    importable(
        "torch",
        "from types import SimpleNamespace\n__version__ = '2.15.0+cpu'\nversion = SimpleNamespace(cuda=None)\n"
        "cuda = SimpleNamespace(is_available=lambda: False)\n",
    )
    assert packages.torch_package(ONE_GPU).status == "problem"
    assert packages.torch_package(NO_DRIVER).status == "ok"


class FakeLibcuda:
    """The calls of libcuda that the doctor makes, for one GPU; `init` is what cuInit returns."""

    def __init__(self, *, init: int = 0) -> None:
        self.init = init

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13020
        return 0

    def cuDeviceGetCount(self, n_gpus: Any) -> int:
        n_gpus._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = b"NVIDIA H200"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDeviceGetPCIBusId(self, bus: Any, size: int, device: ctypes.c_int) -> int:
        bus.value = b"0000:17:00.0"
        return 0

    def cuGetErrorName(self, code: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0


def test_driver_lists_gpus_with_their_compute_capability() -> None:
    finding = gpu.nvidia_driver(driver_from_calls(FakeLibcuda()))
    assert finding == Finding("NVIDIA driver", "ok", "supports CUDA up to 13.2; NVIDIA H200 (compute capability 9.0)")


def test_driver_without_a_gpu_is_a_problem() -> None:
    finding = gpu.nvidia_driver(driver_from_calls(FakeLibcuda(init=100)))
    assert finding.status == "problem"
    assert "CUDA_ERROR_NO_DEVICE" in finding.detail


def test_processor_names_model_and_instruction_sets(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name : Some CPU\nflags : fpu avx2 avx512_vnni\n\nprocessor : 1\n")
    detail = machine.processor(cpuinfo).detail
    assert detail.startswith("Some CPU; ")
    assert detail.endswith("; avx2 avx512_vnni")


def test_a_container_quota_limits_the_cores(tmp_path: Path) -> None:
    cpu_max = tmp_path / "cpu.max"
    cpu_max.write_text("50000 100000\n")
    assert n_processors(cpu_max) == 0.5
    cpu_max.write_text("max 100000\n")
    assert n_processors(cpu_max) >= 1


def test_render_puts_the_remedy_below_and_says_what_works() -> None:
    findings = [Finding("numpy", "ok", "2.4"), Finding("Pillow", "ok", "13"), Finding("onnxruntime", "ok", "1.31")]
    text = render([*findings, Finding("plotly", "missing", "not installed", "pip install plotly")])
    assert "-> pip install plotly" in text
    assert "yes  build and run on the CPU" in text
    assert "no   demo (needs torch, onnx, onnxscript, plotly)" in text


def test_the_torch_backend_runs_on_a_gpu_that_torch_sees() -> None:
    findings = [Finding(name, "ok", "1.0") for name in ("onnx", "onnxruntime", "NVIDIA driver")]
    assert "yes  build and run on the GPU (torch)" in render([*findings, Finding("torch", "ok", "sees the GPU")])
    unseen = Finding("torch", "problem", "no GPU usable", "install another torch")
    assert "no   build and run on the GPU (torch) (needs torch)" in render([*findings, unseen])


def test_cuda_graphs_say_how_strategy_graph_runs(versions: dict[str, str]) -> None:
    versions.update({"cuda-bindings": "13.0", "nvidia-cuda-nvrtc": "13.0"})
    assert gpu.cuda_graphs(ONE_GPU) == Finding(
        "CUDA graphs",
        "ok",
        "strategy 'graph' decides on the device; it takes the fastest of policy-cache, switch, path-cache",
    )
    other_major = gpu.cuda_graphs(Driver((12, 8), ONE_GPU.gpus))
    assert other_major.status == "problem"
    assert other_major.detail.startswith("a SWITCH in a CUDA graph needs a kernel compiled for the driver's CUDA 12.8")
    assert other_major.detail.endswith("reads the policy back for each image (mode path-cache)")
    assert other_major.remedy == install_command("cuda12")
    versions.update({"cuda-bindings": "12.9.4", "nvidia-cuda-nvrtc-cu12": "12.9"})
    assert gpu.cuda_graphs(Driver((12, 8), ONE_GPU.gpus)).status == "ok"
    old = gpu.cuda_graphs(Driver((12, 4), ONE_GPU.gpus))
    assert old.detail.startswith("the driver supports CUDA up to 12.4, a SWITCH in a CUDA graph needs 12.8; strategy")
    assert old.remedy == "update the driver"
    versions.clear()
    bare = gpu.cuda_graphs(ONE_GPU)
    assert bare.detail.endswith("launches each part (mode off)")
    assert bare.remedy == install_command("cuda")
    assert gpu.cuda_graphs(NO_DRIVER).status == "missing"

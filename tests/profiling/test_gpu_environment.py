"""What a profile says of the GPU that it ran on."""

from bdtool.profiling.environment import clock_warnings, describe_gpu, gpu_figures
from engines.libcuda import Gpu
from engines.nvml import GpuState

H200 = Gpu("NVIDIA H200", (9, 0), "0000:17:00.0")


def test_cpu_has_no_gpu():
    assert describe_gpu("cpu") == {}
    assert describe_gpu("cuda:99") == {}


def test_gpu_is_named_with_versions_and_clocks():
    state = GpuState(driver_version="580.65", sm_mhz=1755, max_sm_mhz=1980, memory_mhz=2619, temperature_c=None)
    assert gpu_figures(H200, "13.0", state) == {
        "gpu": "NVIDIA H200",
        "gpu_compute_capability": "9.0",
        "driver_cuda": "13.0",
        "driver": "580.65",
        "gpu_sm_mhz": 1755,
        "gpu_sm_mhz_max": 1980,
        "gpu_memory_mhz": 2619,
    }
    assert set(gpu_figures(H200, "13.0", None)) == {"gpu", "gpu_compute_capability", "driver_cuda"}


def test_slow_clock_at_the_end_is_a_warning():
    assert clock_warnings({}) == []
    assert clock_warnings({"gpu_sm_mhz": 1900, "gpu_sm_mhz_max": 1980}) == []
    [warning] = clock_warnings({"gpu_sm_mhz": 1200, "gpu_sm_mhz_max": 1980})
    assert "1200 MHz at the end, its highest is 1980 MHz" in warning

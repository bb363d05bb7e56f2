"""Events around enqueued calls, and what the driver's management library says of a GPU."""

import ctypes
import gc

from engines.cuda_device import CudaDevice
from engines.nvml import GpuState, gpu_state, state_from_calls
from tests.fake_driver import FakeDriver


def test_times_are_those_of_the_device_and_events_are_used_again():
    driver = FakeDriver()
    device = CudaDevice(driver, 0)
    timer = device.timer()
    times = {"short": [], "long": []}

    def enqueue(n):
        for _ in range(n):
            driver.enqueue(lambda: None)

    short = timer.timed(lambda: enqueue(1), times["short"].append)
    long = timer.timed(lambda: enqueue(5), times["long"].append)
    for _ in range(3):
        with device.current():
            short()
            long()
            long()
        timer.collect()
    assert times == {"short": [1.0] * 3, "long": [5.0] * 6}
    assert driver.calls["cuEventCreate"] == 6  # two for each call between collections
    del timer, short, long
    gc.collect()
    assert driver.calls["cuEventDestroy"] == 6


class FakeNvml:
    def __init__(self, *, init=0, known=b"0000:17:00.0"):
        self.init, self.known, self.open = init, known, 0

    def nvmlInit_v2(self):
        self.open += self.init == 0
        return self.init

    def nvmlShutdown(self):
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id, device):
        device._obj.value = 7
        return 0 if bus_id == self.known else 6

    def nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"580.65.06"
        return 0

    def nvmlDeviceGetClockInfo(self, device, kind, value):
        assert isinstance(device, ctypes.c_void_p)
        value._obj.value = {1: 1755, 2: 2619}[kind]
        return 0

    def nvmlDeviceGetMaxClockInfo(self, device, kind, value):
        value._obj.value = {1: 1980}[kind]
        return 0

    def nvmlDeviceGetTemperature(self, device, sensor, value):
        return 3  # NVML_ERROR_NOT_SUPPORTED


def test_state_has_clocks_in_mhz_and_leaves_out_what_is_not_known():
    nvml = FakeNvml()
    expected = GpuState(driver_version="580.65.06", sm_mhz=1755, max_sm_mhz=1980, memory_mhz=2619, temperature_c=None)
    assert state_from_calls(nvml, "0000:17:00.0") == expected
    assert nvml.open == 0


def test_gpu_that_the_library_does_not_know_has_no_state():
    nvml = FakeNvml()
    assert state_from_calls(nvml, "0000:99:00.0") is None
    assert state_from_calls(FakeNvml(init=9), "0000:17:00.0") is None
    assert nvml.open == 0
    assert gpu_state("no such bus") is None

"""A GPU through its driver, on a stand-in: what it refuses, work that is captured, and machines without one."""

import pytest

from bdtool.errors import BackendError, EngineError
from engines.cuda_device import CudaDevice, checked, open_device
from engines.graph_nodes import GraphNodes
from tests.fake_driver import FakeDriver


@pytest.fixture
def driver():
    return FakeDriver()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", r"\. Free memory on the GPU: nvidia-smi lists who has it"),
        ("CUDA_ERROR_LAUNCH_FAILED", r"\. Work on the GPU failed, and this process can use it no more: start it again"),
        ("CUDA_ERROR_NOT_SUPPORTED", ""),
    ],
)
def test_error_of_the_driver_says_what_to_do_next(driver, error, advice):
    with pytest.raises(EngineError, match=f"^the CUDA driver refuses a stream: {error}{advice}$"):
        checked(driver, (getattr(driver.CUresult, error),), "a stream")


def open_driver_error():
    try:
        open_device("cuda:0")
    except BackendError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("supported", "bindings", "is_refused"), [(12040, "13.5.0", True), (12080, "13.5.0", False)])
def test_bindings_too_new_for_the_driver_are_refused_at_once(monkeypatch, supported, bindings, is_refused):
    driver = FakeDriver()
    driver.version = supported
    monkeypatch.setattr("engines.cuda_device.version", {"cuda-bindings": bindings}.get)
    monkeypatch.setattr("cuda.bindings.driver", driver)
    if is_refused:
        with pytest.raises(
            BackendError, match=r"need a driver of CUDA 12\.8, this one supports CUDA 12\.4.*bindings>=12"
        ):
            open_device("cuda:0")
        open_device("cuda:0", stream=lambda: 0)  # of PyTorch, which times by itself
    else:
        open_device("cuda:0")


def test_machine_without_a_driver_says_so():
    error = open_driver_error()
    if error is None:
        pytest.skip("there is a GPU here")
    assert error.startswith("device 'cuda:0': ")
    assert "bdtool doctor" in error


def test_capture_of_work_that_fails_leaves_the_stream_usable(driver):
    device = CudaDevice(driver, 0)

    def fail():
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        device.capture(fail)
    with device.current():
        device.synchronize(device.capture_stream)  # the stand-in refuses it while that is still captured


def test_work_of_others_does_not_join_a_capture(driver):
    """Results name the device's stream, and whoever took one may put work there at any time."""
    device, done = CudaDevice(driver, 0), []

    def enqueue():
        driver.enqueue(lambda: done.append("captured"), stream=int(device.capture_stream))
        driver.enqueue(lambda: done.append("of others"), stream=int(device.stream))
        with device.current():
            device.synchronize()
            device.hold_back(0x99)

    assert int(device.capture_stream) != int(device.stream)
    graph = device.capture(enqueue)
    assert done == ["of others"]
    with device.current():
        device.launch(GraphNodes(driver, device.context).instantiate(graph))
    assert done == ["of others", "captured"]

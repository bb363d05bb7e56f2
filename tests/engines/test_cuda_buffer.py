"""Device memory and the page-locked memory that copies go through, on a stand-in for the driver."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from engines.cuda_buffer import DeviceBuffer
from engines.cuda_device import CudaDevice
from tests.fake_driver import FakeDriver

REPOSITORY = Path(__file__).resolve().parents[2]
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def driver():
    return FakeDriver()


def test_values_come_back_through_one_piece_of_page_locked_memory(driver):
    buffer = DeviceBuffer(CudaDevice(driver, 0), (2, 3), "float32")
    for values in (VALUES, VALUES[::-1], (10 * VALUES).astype(np.float64)):  # whatever their layout and dtype
        buffer.write(values)
        np.testing.assert_array_equal(buffer.read(), values)
    assert driver.calls["cuMemHostAlloc"] == 1
    with pytest.raises(ValueError, match=r"got values \[1, 3\] for a buffer \[2, 3\]"):
        buffer.write(VALUES[:1])


def test_write_waits_until_the_copy_before_it_has_read_the_memory(driver):
    buffer = DeviceBuffer(CudaDevice(driver, 0), (2, 3), "float32")
    buffer.write(VALUES)
    assert driver.calls["cuEventSynchronize"] == 0
    buffer.write(VALUES)
    assert (driver.calls["cuEventSynchronize"], driver.calls["cuEventRecord"]) == (1, 2)
    assert driver.calls["cuStreamSynchronize"] == 0  # for what is enqueued behind the copy nobody waits


_LEFT_OPEN = """
import atexit
from engines.cuda_device import CudaDevice
from tests.fake_driver import FakeDriver

driver = FakeDriver()
atexit.register(lambda: print(driver.calls["cuStreamDestroy"], driver.calls["cuDevicePrimaryCtxRelease"]))
device = CudaDevice(driver, 0)
"""


def test_context_outlives_a_program_that_closes_nothing(driver):
    command = [sys.executable, "-c", _LEFT_OPEN]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "1 0\n"
    device = CudaDevice(driver, 0)
    del device
    gc.collect()
    assert driver.calls["cuDevicePrimaryCtxRelease"] == 1


def test_several_buffers_are_read_with_one_wait(driver):
    device = CudaDevice(driver, 0)
    first, second = (DeviceBuffer(device, (2, 3), "float32") for _ in range(2))
    first.write(VALUES)
    second.write(-VALUES)
    begun = first.begin_read()
    assert driver.calls["cuStreamSynchronize"] == 0
    np.testing.assert_array_equal(second.read(), -VALUES)
    np.testing.assert_array_equal(begun, VALUES)
    assert driver.calls["cuStreamSynchronize"] == 1


def test_page_locked_memory_lives_as_long_as_an_array_of_it_and_no_copy_is_under_way(driver):
    buffer = DeviceBuffer(CudaDevice(driver, 0), (2, 3), "float32")
    buffer.write(VALUES)
    row = buffer.read()[1]
    del buffer
    gc.collect()
    assert driver.memory == {}
    np.testing.assert_array_equal(row, VALUES[1])
    waited = driver.calls["cuStreamSynchronize"]
    del row
    gc.collect()
    assert driver.host_memory == {}
    assert driver.calls["cuStreamSynchronize"] == waited + 1


def test_activation_that_never_leaves_the_device_takes_none(driver):
    device = CudaDevice(driver, 0)
    first, second = (DeviceBuffer(device, (2, 3), "float32") for _ in range(2))
    first.write(VALUES)
    second.gather(first, np.array([1, 0]))
    assert len(driver.host_memory) == 1
    np.testing.assert_array_equal(second.read(), VALUES[::-1])


def test_memory_is_given_back_whichever_thread_collects_it(driver):
    buffers = [DeviceBuffer(CudaDevice(driver, 0), (2, 3), "float32")]
    buffers[0].write(VALUES)
    contexts = []

    def collect():
        buffers.clear()
        gc.collect()
        contexts.extend(driver.contexts)

    thread = threading.Thread(target=collect)
    thread.start()
    thread.join()
    assert (driver.memory, driver.host_memory) == ({}, {})
    assert contexts == []  # the thread has what it had
    assert driver.calls["cuStreamDestroy"] == 1


def test_cycles_are_not_collected_while_work_is_captured(driver):
    device = CudaDevice(driver, 0)
    cycle = [DeviceBuffer(device, (2, 3), "float32")]
    cycle.append(cycle)

    def enqueue():
        nonlocal cycle
        del cycle
        made = [[i] for i in range(10 * gc.get_threshold()[0])]  # what sets off a collection
        assert len(made) == 10 * gc.get_threshold()[0]

    device.capture(enqueue)
    assert len(driver.memory) == 1
    assert gc.isenabled()
    gc.collect()
    assert driver.memory == {}


def test_cycles_are_not_collected_while_any_thread_captures(driver):
    """Bundles may be opened side by side, and what ends first must not let the other's capture be ended."""
    begun, done, seen = threading.Event(), threading.Event(), []

    def capture_longer():
        begun.set()
        assert done.wait(10)
        seen.append(gc.isenabled())

    def capture_first():
        thread.start()
        assert begun.wait(10)

    thread = threading.Thread(target=lambda: CudaDevice(FakeDriver(), 0).capture(capture_longer))
    CudaDevice(driver, 0).capture(capture_first)
    done.set()
    thread.join()
    assert seen == [False]
    assert gc.isenabled()


def test_rows_move_by_runs_of_neighbours(driver):
    device = CudaDevice(driver, 0)
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    source, target = (DeviceBuffer(device, shape, "float32") for shape in ((6, 4), (4, 4)))
    source.write(values)
    driver.copies.clear()
    target.gather(source, np.array([1, 2, 3, 5]))
    assert driver.copies == ["DtoD"] * 2
    np.testing.assert_array_equal(target.read(), values[[1, 2, 3, 5]])
    source.scatter(target, np.array([0, 1, 4, 5]))
    np.testing.assert_array_equal(source.read(), values[[1, 2, 2, 3, 3, 5]])
    other = DeviceBuffer(device, (6, 4), "float32")
    other.copy_rows(source, np.array([0, 2, 3]))
    np.testing.assert_array_equal(other.read(), [*values[[1]], 0 * values[0], *values[[2, 3]], *0 * values[:2]])
    target.gather(source, np.array([], dtype=np.int64))
    np.testing.assert_array_equal(target.first(2).read(), values[[1, 2]])


def test_new_memory_is_zero_and_a_wrong_shape_is_refused(driver):
    device = CudaDevice(driver, 0)
    buffer = DeviceBuffer(device, (2, 3), "bfloat16")
    with device.current():
        assert buffer.read().tolist() == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"values \[3, 2\] for a buffer \[2, 3\]"):
        buffer.write(np.zeros((3, 2), np.uint16))

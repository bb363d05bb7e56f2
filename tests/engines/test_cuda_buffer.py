"""Device memory and the page-locked memory that copies go through, on a stand-in for the driver."""

import gc

import numpy as np
import pytest

from engines.cuda_buffer import DeviceBuffer
from engines.cuda_device import CudaDevice
from tests.fake_driver import FakeDriver

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

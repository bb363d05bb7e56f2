"""The stand-in that finds races finds them: two accesses to the same memory that nothing puts in order."""

import gc

import numpy as np
import pytest

from engines.cuda_buffer import DeviceBuffer
from engines.cuda_device import CudaDevice, CudaEvent
from engines.graph_nodes import GraphNodes
from tests.race_detector import RaceDetector

FIRST, SECOND = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
BLOCKING = 0x88


@pytest.fixture
def driver():
    return RaceDetector(blocking=[BLOCKING])


@pytest.fixture
def device(driver):
    return CudaDevice(driver, 0)


@pytest.fixture
def buffer(device):
    buffer = DeviceBuffer(device, (2, 3), "float32")
    buffer.write(FIRST)
    return buffer


def _touch(driver, buffer, stream, *, writes=True):
    driver.enqueue(lambda: driver.view(buffer.address, buffer.n_bytes, writes=writes), stream=stream)


def test_calls_of_a_buffer_are_in_order(driver, device, buffer):
    other = DeviceBuffer(device, (2, 3), "float32")
    buffer.write(SECOND)
    other.gather(buffer, np.array([1, 0]))
    buffer.first(1).scatter(other, np.array([0]))
    begun = other.begin_read()
    np.testing.assert_array_equal(buffer.read(), SECOND)
    np.testing.assert_array_equal(begun, SECOND)
    buffer.write(FIRST)
    del buffer, other, begun
    gc.collect()
    driver.check()


@pytest.mark.parametrize("writes", [False, True])
def test_stream_has_to_wait_for_what_another_one_writes(driver, device, buffer, writes):
    device.hold_back(0x77)
    _touch(driver, buffer, 0x77, writes=writes)
    driver.check()
    _touch(driver, buffer, 0x99, writes=writes)
    [race] = driver.races
    assert race.startswith("write by 119: " if writes else "write by 5: ")  # the last one to write
    assert (" | write by 153: " if writes else " | read by 153: ") + "tests/test_race_detector.py" in race


def test_two_that_read_are_no_race(driver, device, buffer):
    device.synchronize()
    for stream in (0x77, 0x99):
        _touch(driver, buffer, stream, writes=False)
    driver.check()
    _touch(driver, buffer, 0x77)
    assert len(driver.races) == 1


def test_event_stands_for_what_was_there_when_it_was_recorded(driver, device, buffer):
    event = CudaEvent(device)
    event.record()
    buffer.gather(buffer.first(2), np.array([0]))
    event.hold(0x77)
    _touch(driver, buffer, 0x77)
    assert len(driver.races) == 1


def test_default_stream_waits_for_blocking_streams_and_they_for_it(driver, device, buffer):
    device.hold_back(BLOCKING)
    _touch(driver, buffer, 0)
    _touch(driver, buffer, BLOCKING)
    driver.check()
    _touch(driver, buffer, int(device.stream))  # does not block, and did not wait
    assert len(driver.races) == 1


def test_copies_need_the_host_to_wait(driver, device, buffer):
    begun = buffer.begin_read()
    assert (begun.view(np.uint8) == 0xCD).all()  # nothing is there yet
    begun[:] = 7
    device.synchronize()
    np.testing.assert_array_equal(begun, FIRST)
    device.upload(buffer.address, begun)
    begun[:] = 7
    with pytest.raises(AssertionError, match="the host writes memory that is still copied from: engines/cuda_device"):
        driver.check()


def test_time_of_an_event_that_is_not_passed(driver, device):
    with device.current():
        start, end = CudaEvent(device), CudaEvent(device)
        for wait in (end.synchronize, lambda: None):
            start.record()
            buffer = DeviceBuffer(device, (2, 3), "float32")
            end.record()
            wait()
            start.elapsed_time(end)
            assert buffer.n_bytes
            assert len(driver.races) == (wait != end.synchronize)


@pytest.mark.parametrize("in_order", [False, True])
def test_nodes_of_a_graph_need_an_edge(driver, device, buffer, in_order):
    def captured(*, writes):
        return device.capture(lambda: _touch(driver, buffer, device.capture_stream, writes=writes))

    nodes, writer, reader = GraphNodes(driver, device.context), captured(writes=True), captured(writes=False)
    with nodes.new_graph() as graph:
        first = nodes.child(graph, [], writer)
        nodes.child(graph, [first] if in_order else [], reader)
        executable = nodes.instantiate(graph)
    for _ in range(2):
        device.launch(executable)
    assert len(driver.races) == (0 if in_order else 2)

"""ONNX Runtime's memory, on the CPU and against the stand-in for its GPU providers: rows that move within a device."""

import numpy as np
import pytest

from engines.registry import open_backend
from tests.fake_onnxruntime import install_onnxruntime


@pytest.fixture
def ort(monkeypatch, tmp_path):
    return install_onnxruntime(monkeypatch, tmp_path / "cache")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_rows_move_between_buffers(ort, device, dtype):
    backend = open_backend("onnxruntime", device)
    values = np.arange(4 * 2 * 3).reshape(4, 2, 3).astype(dtype)
    whole, other = (backend.allocate(values.shape, dtype) for _ in range(2))
    whole.write(values)
    other.write(-values)
    some = backend.allocate(values.shape, dtype).first(2)
    some.gather(whole, np.array([3, 1]))
    np.testing.assert_array_equal(some.read(), values[[3, 1]])
    other.copy_rows(whole, np.array([1, 3]))
    np.testing.assert_array_equal(other.read(), [-values[0], values[1], -values[2], values[3]])
    whole.scatter(some, np.array([0, 2]))
    np.testing.assert_array_equal(whole.read(), values[[3, 1, 1, 3]])


def test_parts_that_run_on_as_many_rows_share_memory(ort):
    """A ResNet-110 would else hold some GB for mixed batches of 64."""
    whole = open_backend("onnxruntime", "cuda:0").allocate((4, 2), "float32")
    assert whole.first(2) is whole.first(2)
    assert whole.first(2).read().shape == (2, 2)


def test_rows_on_a_gpu_do_not_pass_through_the_host(ort, monkeypatch):
    backend = open_backend("onnxruntime", "cuda:0")
    whole, other = (backend.allocate((4, 2), "float32") for _ in range(2))
    monkeypatch.setattr(type(whole), "read", None)
    monkeypatch.setattr(type(whole), "write", None)
    opened = len(ort.sessions)
    for _ in range(3):
        whole.first(2).gather(other, np.array([0, 3]))
        whole.scatter(other.first(1), np.array([2]))
        whole.copy_rows(other, np.array([1]))
    assert ort.sessions[opened:] == [{"CUDAExecutionProvider": {"device_id": "0"}}] * 3  # one each

"""Images that are on the GPU already: taken where they are, or refused with the reason."""

import numpy as np
import pytest
import torch

from bdtool import Orchestrator
from bdtool.errors import DataError
from engines.cuda_buffer import DeviceBuffer
from engines.cuda_device import CudaDevice
from engines.device_array import device_array
from tests.fake_tensorrt import install_gpu

KEEP = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=bool)
STREAM = 0x77


class GpuArray:
    """What PyCUDA, CuPy and others show of an array: its `__cuda_array_interface__`."""

    def __init__(self, driver, values, **changes):
        self._buffer = DeviceBuffer(CudaDevice(driver, 0), values.shape, values.dtype.name)
        self._buffer.write(values)
        interface = {"shape": values.shape, "typestr": values.dtype.str, "data": (self._buffer.address, False)}
        self.__cuda_array_interface__ = interface | {"version": 3, "strides": None, "stream": STREAM} | changes

    @property
    def address(self):
        return self._buffer.address


@pytest.fixture
def driver(monkeypatch, tmp_path):
    return install_gpu(monkeypatch, tmp_path)


def _open(bundle, strategy="chain"):
    return Orchestrator.open(bundle, backend="tensorrt", device="cuda:0", strategy=strategy)


@pytest.mark.parametrize("form", ["pixels", "preprocessed"])
@pytest.mark.parametrize("strategy", ["chain", "graph", "full"])
def test_images_never_pass_through_the_host(driver, tiny, request, preprocessed, torch_logits, strategy, form):
    images = request.getfixturevalue(form)(tiny.model, 3)
    keep = None if strategy == "full" else KEEP
    with _open(tiny.bundle, strategy) as runtime:
        runtime.run(images, policy=keep)
        on_gpu = GpuArray(driver, images)
        driver.copies.clear()
        result = runtime.run(on_gpu, policy=keep)
        assert driver.copies.count("HtoD") == (3 if strategy == "graph" else 0)  # of the keep bits of three images
    assert set(driver.waited_for) == {STREAM}  # until the array is there
    np.testing.assert_allclose(result.logits, torch_logits(tiny.model, preprocessed(tiny.model, 3), keep), atol=1e-4)


def test_batch_beyond_the_bundle_runs_in_slices(driver, tiny, preprocessed, torch_logits):
    images = np.resize(preprocessed(tiny.model, 4), (70, 3, 32, 32))
    with _open(tiny.bundle) as runtime:
        logits = runtime.run(GpuArray(driver, images), policy="101").logits
    np.testing.assert_allclose(logits[[0, 69]], torch_logits(tiny.model, images[[0, 69]], KEEP[[0, 0]]), atol=1e-4)


def test_memory_of_another_context_is_refused(driver, tiny, preprocessed):
    images = GpuArray(driver, preprocessed(tiny.model, 1))
    driver.owners[images.address] = 0xBAD
    with _open(tiny.bundle) as runtime, pytest.raises(DataError, match=r"another CUDA context.*pycuda\.autoprimaryctx"):
        runtime.run(images)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (
            np.zeros((1, 3, 32, 32), np.uint8),
            {},
            r"got uint8 \[1, 3, 32, 32\], expected .* float32 \[N, 3, 32, 32\] or pixels uint8 \[N, 32, 32, 3\]",
        ),
        (np.zeros((1, 3, 16, 16), np.float32), {}, r"got float32 \[1, 3, 16, 16\]"),
        (np.zeros((1, 3, 32, 32), np.float32), {"strides": (4, 4, 384, 12)}, "expected them C-contiguous"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(driver, tiny, values, changes, message):
    with _open(tiny.bundle) as runtime, pytest.raises(DataError, match=message):
        runtime.run(GpuArray(driver, values, **changes))


def test_backend_on_the_cpu_refuses_and_says_what_takes_them(driver, tiny, preprocessed):
    images = GpuArray(driver, preprocessed(tiny.model, 1))
    with Orchestrator.open(tiny.bundle) as runtime, pytest.raises(DataError, match="this backend takes host arrays"):
        runtime.run(images)
    with (
        Orchestrator.open(tiny.bundle, backend="torch") as runtime,
        pytest.raises(DataError, match="the torch backend runs on the CPU"),
    ):
        runtime.run(images)


def test_what_is_no_array_is_a_type_error(driver, tiny):
    with _open(tiny.bundle) as runtime, pytest.raises(TypeError, match="numpy array, or one on a GPU; got list"):
        runtime.run([[1.0]])


def test_dlpack_on_cuda_is_read_by_pytorch(monkeypatch, driver):
    array = GpuArray(driver, np.zeros((2, 3), np.float32))

    class Capsule:
        def __dlpack_device__(self):
            return (2, 0)

    monkeypatch.setattr(torch, "from_dlpack", lambda values: array if isinstance(values, Capsule) else None)
    found = device_array(Capsule())
    assert (found.address, found.shape, found.owner) == (array.address, (2, 3), array)
    assert device_array(np.zeros(3)) is None  # DLPack, but on the host


def test_no_stream_means_the_default_one(driver):
    found = device_array(GpuArray(driver, np.zeros((4, 3), np.float32), stream=None))
    assert found.stream == 1
    rows = found[1:3]
    assert (rows.address, rows.shape, rows.n_bytes) == (found.address + 12, (2, 3), 24)
    with pytest.raises(TypeError, match="a slice of neighbours"):
        found[[0, 2]]

"""Images that are on the GPU already: taken where they are, with the logits there too, or refused with the reason."""

import ctypes
import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bdtool import Orchestrator
from bdtool.errors import DataError
from bdtool.runtime.path_cache import PathOptions
from engines.cuda_buffer import DeviceBuffer
from engines.cuda_device import CudaDevice
from engines.device_array import LEGACY_STREAM, device_array
from engines.torchrt import TorchBackend
from tests.fake_tensorrt import build_engines, install_gpu

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


def _values(driver, array):
    """Return what another library finds behind `__cuda_array_interface__`."""
    interface = array.__cuda_array_interface__
    assert (interface["version"], interface["strides"], interface["data"][1]) == (3, None, False)
    n_bytes = int(np.prod(interface["shape"])) * np.dtype(interface["typestr"]).itemsize
    return driver.view(interface["data"][0], n_bytes).view(interface["typestr"]).reshape(interface["shape"]).copy()


@pytest.fixture
def driver(monkeypatch, tmp_path):
    return install_gpu(monkeypatch, tmp_path)


def _open(bundle, strategy="chain"):
    return Orchestrator.open(bundle, backend="tensorrt", device="cuda:0", strategy=strategy)


def test_fewer_than_the_engines_take_are_refused(driver, bundle_copy, tiny, pixels):
    build_engines(bundle_copy, min_batch=4, opt_batch=4, max_batch=4)
    with _open(bundle_copy) as runtime:
        assert len(runtime.run(GpuArray(driver, pixels(tiny.model, 4)), policy="111").logits) == 4
        with pytest.raises(DataError, match=r"images: 3 on the GPU remain for one call, the engines take 4 at"):
            runtime.run(GpuArray(driver, pixels(tiny.model, 3)), policy="111")


@pytest.mark.parametrize("form", ["pixels", "preprocessed"])
@pytest.mark.parametrize("strategy", ["chain", "graph", "full"])
def test_neither_images_nor_logits_pass_through_the_host(
    driver, tiny, request, preprocessed, torch_logits, strategy, form
):
    images = request.getfixturevalue(form)(tiny.model, 3)
    keep = None if strategy == "full" else KEEP
    with _open(tiny.bundle, strategy) as runtime:
        runtime.run(images, policy=keep)
        on_gpu = GpuArray(driver, images)
        driver.copies.clear()
        result = runtime.run(on_gpu, policy=keep)
        # the bits that are given, and those that the graph reports, of each image
        n_bits = 3 if strategy == "graph" else 0
        assert (driver.copies.count("HtoD"), driver.copies.count("DtoH")) == (n_bits, n_bits)
        expected = torch_logits(tiny.model, preprocessed(tiny.model, 3), keep)
        np.testing.assert_allclose(_values(driver, result.logits), expected, atol=1e-4)
    assert STREAM in driver.waited_for  # until the array is there
    assert STREAM in driver.held_back  # until it was read: its memory may be given to others next
    assert driver.held_back[-1] == LEGACY_STREAM  # PyTorch and PyCUDA read there, and ask for no stream
    assert result.logits.__cuda_array_interface__["stream"] == 5  # of the device's stream, for others to wait for
    with pytest.raises(TypeError, match="the logits are on the GPU, like the images"):
        _ = result.classes


@pytest.mark.parametrize("mode", ["policy-cache", "switch", "path-cache", "off"])
def test_every_graph_mode_leaves_logits_on_the_device(driver, tiny, preprocessed, torch_logits, mode):
    images = preprocessed(tiny.model, 3)
    options = {"cuda_graph": mode, "paths": PathOptions(ahead=list(KEEP[:1]))}
    with Orchestrator.open(tiny.bundle, backend="tensorrt", device="cuda:0", strategy="graph", **options) as runtime:
        result = runtime.run(GpuArray(driver, images), policy=KEEP)
        np.testing.assert_array_equal(result.policy, KEEP)
        np.testing.assert_allclose(_values(driver, result.logits), torch_logits(tiny.model, images, KEEP), atol=1e-4)


def test_each_form_of_images_has_a_graph_mode_of_its_own(driver, tiny, preprocessed, torch_logits):
    """Plain launches take several images on the GPU at once, and CUDA graphs one."""
    images = preprocessed(tiny.model, 3)
    driver.instantiate_ms = driver.conditional_ms = 1000
    with _open(tiny.bundle, "graph") as runtime:
        assert runtime.graph_choice.mode == "off"
        driver.instantiate_ms = driver.conditional_ms = 0
        driver.launch_ms = 100
        result = runtime.run(GpuArray(driver, images), policy=KEEP)
        assert runtime.graph_choice.mode == "switch"
        np.testing.assert_allclose(_values(driver, result.logits), torch_logits(tiny.model, images, KEEP), atol=1e-4)


def test_logits_are_the_callers_to_keep(driver, tiny, preprocessed):
    images = preprocessed(tiny.model, 4)
    with _open(tiny.bundle) as runtime:
        first = runtime.run(GpuArray(driver, images[:2]), policy="111").logits
        before = _values(driver, first)
        runtime.run(GpuArray(driver, images[2:]), policy="000")
        np.testing.assert_array_equal(_values(driver, first), before)
    n_bytes = {array.nbytes for array in driver.memory.values()}
    address = first.address
    del runtime, first
    gc.collect()
    assert before.nbytes in n_bytes
    assert address not in driver.memory


def test_logits_of_one_bundle_are_an_array_for_another_call(driver):
    backend_device = CudaDevice(driver, 0)
    buffer = DeviceBuffer(backend_device, (2, 3), "float32")
    buffer.write(np.arange(6, dtype=np.float32).reshape(2, 3))
    again = device_array(buffer.copy_out())
    assert (again.shape, again.dtype, again.stream) == ((2, 3), np.float32, 5)
    np.testing.assert_array_equal(_values(driver, again), np.arange(6).reshape(2, 3))


def test_torch_gives_its_own_memory_and_joins_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 0}))
    backend, values = TorchBackend(), np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = backend.allocate((2, 3), "float32")
    buffer.write(values)
    first = buffer.copy_out()
    buffer.write(-values)
    both = backend.concatenate([first, buffer.copy_out()])
    interface = both.__cuda_array_interface__
    assert (interface["shape"], interface["typestr"], interface["stream"]) == ((4, 3), "<f4", 1)
    found = np.frombuffer(ctypes.string_at(both.address, both.n_bytes), np.float32).reshape(4, 3)
    np.testing.assert_array_equal(found, np.concatenate([values, -values]))


@pytest.mark.parametrize("strategy", ["chain", "graph", "full"])
def test_context_of_the_caller_is_what_it_was(driver, tiny, bundle_copy, pixels, strategy):
    """As of one who has pycuda.autoinit, or PyTorch on another GPU, and gives images on the host."""
    driver.contexts[:] = ["the caller's"]
    with _open(bundle_copy, strategy) as runtime:  # whose engines are built first
        runtime.run(pixels(tiny.model, 2))
        if strategy != "full":
            runtime.keep_probability(pixels(tiny.model, 2))
    assert driver.contexts == ["the caller's"]


@pytest.mark.parametrize("contexts", [[], ["of another GPU"]])
def test_batch_beyond_the_bundle_runs_in_slices(driver, tiny, preprocessed, torch_logits, contexts):
    images = np.resize(preprocessed(tiny.model, 4), (70, 3, 32, 32))
    with _open(tiny.bundle) as runtime:
        on_gpu = GpuArray(driver, images)
        driver.contexts[:] = contexts  # of a thread that nobody prepared, or whose context is another GPU's
        logits = _values(driver, runtime.run(on_gpu, policy="101").logits)
        assert driver.contexts == contexts
    assert logits.shape == (70, 10)
    np.testing.assert_allclose(logits[[0, 69]], torch_logits(tiny.model, images[[0, 69]], KEEP[[0, 0]]), atol=1e-4)


@pytest.mark.parametrize(
    ("context", "gpu", "message"),
    [
        (0xBAD, 0, r"another CUDA context than the primary one of cuda:0.*pycuda\.autoprimaryctx"),
        (0xBAD, 1, r"is on cuda:1, the engines run on cuda:0\. Copy them there first, or open .* --device cuda:1"),
        (0, 1, "is on cuda:1, the engines run on cuda:0"),  # a pool's, which belongs to no context
    ],
)
def test_memory_of_another_context_or_gpu_is_refused(driver, tiny, preprocessed, context, gpu, message):
    images = GpuArray(driver, preprocessed(tiny.model, 1))
    driver.owners[images.address], driver.ordinals[images.address] = context, gpu
    with _open(tiny.bundle) as runtime, pytest.raises(DataError, match=message):
        runtime.run(images)


def test_torch_refuses_memory_of_another_gpu(monkeypatch, driver):
    """PyTorch itself would copy it."""
    images, backend = device_array(GpuArray(driver, np.zeros((1, 3, 4, 4), np.float32))), TorchBackend()
    backend.device = torch.device("cuda:1")
    for address in (images.address, images.address + 1):
        tensor = SimpleNamespace(data_ptr=lambda address=address: address)
        monkeypatch.setattr(torch, "as_tensor", lambda values, device, tensor=tensor: tensor)
        if address == images.address:
            backend.check_device_array(images)
        else:
            with pytest.raises(DataError, match="the GPU array is not on cuda:1"):
                backend.check_device_array(images)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (
            np.zeros((1, 3, 32, 32), np.uint8),
            {},
            r"got uint8 \[1, 3, 32, 32\], expected .* float32 \[N, 3, 32, 32\] or pixels uint8 \[N, 32, 32, 3\]",
        ),
        (np.zeros((1, 3, 16, 16), np.float32), {}, r"got float32 \[1, 3, 16, 16\]"),
        (np.zeros((0, 3, 32, 32), np.float32), {}, r"got float32 \[0, 3, 32, 32\]"),
        (np.zeros((1, 3, 32, 32), np.float32), {"strides": (4, 4, 384, 12)}, "expected them C-contiguous"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(driver, tiny, values, changes, message):
    with _open(tiny.bundle) as runtime, pytest.raises(DataError, match=message):
        runtime.run(GpuArray(driver, values, **changes))


@pytest.mark.parametrize("form", ["preprocessed", "pixels"])
def test_backend_on_the_cpu_refuses_and_says_what_takes_them(driver, tiny, preprocessed, pixels, form):
    images = GpuArray(driver, (pixels if form == "pixels" else preprocessed)(tiny.model, 1))
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


def test_a_tensor_with_a_gradient_is_refused():
    class Learned:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad")  # as PyTorch

    with pytest.raises(DataError, match=r"requires grad\). Pass images.detach\(\)"):
        device_array(Learned())


@pytest.mark.parametrize(("stream", "current"), [(0x5, ("external", 0x5)), (0, "default"), (1, "default")])
def test_dlpack_is_made_by_pytorch_on_the_stream_of_the_values(monkeypatch, driver, stream, current):
    given = {}

    class Tensor:
        def __dlpack__(self, **options):
            return {**given, **options}

    class Within:
        def __init__(self, name, value):
            self.name, self.value = name, value

        def __enter__(self):
            given[self.name] = self.value

        def __exit__(self, *error):
            del given[self.name]

    monkeypatch.setattr(torch, "as_tensor", lambda values, device: given.update(of=values, on=device) or Tensor())
    monkeypatch.setattr(torch.cuda, "device", lambda index: Within("device", index))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Within("stream_of_values", stream))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda number, device: ("external", number))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    buffer = DeviceBuffer(CudaDevice(driver, 3, stream=lambda: stream), (2, 3), "float32")
    array = buffer.copy_out()
    assert array.__dlpack_device__() == array[1:].__dlpack_device__() == (2, 3)
    assert array.__dlpack__(stream=7, max_version=(1, 0)) == {
        "of": array,
        "on": "cuda:3",
        "device": 3,
        "stream_of_values": current,
        "stream": 7,
        "max_version": (1, 0),
    }
    of_somebody_else = device_array(GpuArray(driver, np.zeros((4, 3), np.float32)))
    with pytest.raises(BufferError, match="take it by __cuda_array_interface__"):
        of_somebody_else.__dlpack__()


def test_tensor_is_made_on_the_current_stream_of_pytorch(monkeypatch, driver):
    """Its interface, of version 2, says nothing of streams."""

    class OnGpu(torch.Tensor):
        __cuda_array_interface__ = GpuArray(driver, np.zeros((4, 3), np.float32)).__cuda_array_interface__

    del OnGpu.__cuda_array_interface__["stream"]
    for current, stream in ((0x77, 0x77), (0, 1)):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: _stream(current))
        assert device_array(torch.zeros(4, 3).as_subclass(OnGpu)).stream == stream


def _stream(number):
    return type("Stream", (), {"cuda_stream": number})


def test_strides_of_axes_with_one_row_do_not_matter(driver):
    found = device_array(GpuArray(driver, np.zeros((1, 2, 3), np.float32), strides=(999, 12, 4)))
    assert found.shape == (1, 2, 3)


def test_no_stream_means_the_default_one(driver):
    found = device_array(GpuArray(driver, np.zeros((4, 3), np.float32), stream=None))
    assert found.stream == 1
    rows = found[1:3]
    assert (rows.address, rows.shape, rows.n_bytes) == (found.address + 12, (2, 3), 24)
    with pytest.raises(TypeError, match="a slice of neighbours"):
        found[[0, 2]]

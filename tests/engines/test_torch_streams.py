"""Who waits for whom on a GPU with backend `torch`: PyTorch's streams are stood in for."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bdtool.errors import EngineError
from engines import torch_buffer, torch_streams, torchrt
from engines.cuda_device import CudaDevice
from engines.device_timer import CopyWatch
from engines.torch_graph import TorchCapturer
from engines.torchrt import TorchBackend
from tests.fake_driver import FakeDriver


def test_events_are_put_on_the_current_stream_of_their_gpu(monkeypatch):
    """PyTorch's own take the current GPU's, which need not be the backend's."""
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SimpleNamespace(record=recorded.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    recorded = []
    torchrt._TimingEvent(torch.device("cuda:1")).record()
    assert recorded == ["stream of cuda:1"]


@pytest.mark.parametrize(("stream", "waited_for"), [(0, "default"), (1, "default"), (2, "all"), (77, 77)])
def test_memory_that_was_read_is_not_given_to_others_before(monkeypatch, stream, waited_for):
    waits = []

    def other(name):
        return SimpleNamespace(wait_stream=lambda current: waits.append((name, current)))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: other("default"))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: other(stream))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(("all", "current")))
    torch_streams.hold_back(stream, torch.device("cuda:0"))
    assert waits == [(waited_for, "current")]


@pytest.mark.parametrize(("stream", "waited_for"), [(0, "default"), (1, "default"), (2, "all"), (77, 77)])
def test_current_stream_waits_for_the_one_that_makes_an_array(monkeypatch, stream, waited_for):
    """PyTorch does not take the driver's numbers of the default streams, which `__cuda_array_interface__` gives."""
    waits = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=waits.append))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append("all"))
    torch_streams.wait_for(stream, torch.device("cuda:0"))
    assert waits == [waited_for]


def test_work_on_another_stream_waits_for_the_work_before(monkeypatch):
    """Buffers are the same, and logits that stay on the device are not waited for."""
    log, current = [], []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event.of}")

    class Event:
        def record(self, stream):
            self.of = stream.name

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    backend, first, second = TorchBackend(device="cuda:0"), Stream("first"), Stream("second")
    for stream in (first, first, second, second, first):
        current.append(stream)
        with backend.current():
            log.append(stream.name)
    before, behind = "second waits for first", "first waits for second"
    assert log == ["first", "first", before, "second", "second", behind, "first"]


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")
BROKEN = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")


class _Failing:
    """An event of a GPU on which work failed."""

    def record(self, stream):
        raise BROKEN

    def synchronize(self):
        raise BROKEN


@pytest.fixture
def broken_gpu(monkeypatch):
    """Return a backend on a GPU on which work failed: no call of PyTorch's works any more."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "Event", _Failing)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return TorchBackend(device="cuda:0")


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (None, r"^work on cuda:0: CUDA error: an illegal memory access was encountered\. .* start it again$"),
        (BROKEN, r"^work on cuda:0: CUDA error: an illegal memory access was encountered\. .* start it again$"),
        (OUT_OF_MEMORY, r"^work on cuda:0: CUDA out of memory\. .* free\. Free memory on the GPU: nvidia-smi lists"),
    ],
)
def test_work_that_fails_on_the_gpu_says_what_to_do_next(broken_gpu, failure, expected):
    def fail():
        with broken_gpu.current():
            if failure is not None:
                raise failure

    with pytest.raises(EngineError, match=expected):
        fail()


def test_error_that_is_not_of_the_gpu_stays_what_it_is(broken_gpu):
    with pytest.raises(RuntimeError, match="of a controller"), broken_gpu.current():
        raise RuntimeError("of a controller")


def test_letting_go_of_a_broken_gpu_is_quiet(broken_gpu, monkeypatch):
    """A finalizer's error has nobody to go to: Python prints it, for each buffer."""
    printed = []
    monkeypatch.setattr("sys.unraisablehook", lambda failure: printed.append(failure.exc_value))
    with pytest.raises(EngineError), broken_gpu.current():
        pass
    broken_gpu._lasting(_Failing())
    assert printed == []


@pytest.mark.parametrize("failing", ["zeros", "from_numpy"])
def test_memory_that_a_gpu_has_not_got_is_named(monkeypatch, tiny_bundle, failing):
    def fail(*arguments, **options):
        raise OUT_OF_MEMORY

    part = tiny_bundle.network.part("block_00")
    model = tiny_bundle.part_path(part).read_bytes()
    asked = {
        "zeros": lambda: TorchBackend().allocate((1, 16), "float32"),
        "from_numpy": lambda: TorchBackend().load(part, model, layout="NCHW"),
    }
    monkeypatch.setattr(torch, failing, fail)
    named = r"(memory for float32 \[1, 16\]|'block_00': its weights) on cpu: .* Free memory"
    with pytest.raises(EngineError, match=named):
        asked[failing]()


@pytest.mark.parametrize(("number", "expected"), [(0, []), (77, ["memory waits", "default waits for current"])])
def test_default_stream_waits_for_what_is_handed_out(monkeypatch, number, expected):
    """Others read there without asking; on the default stream itself there is nothing to wait for."""
    log = []
    current = type("Stream", (), {"cuda_stream": number, "__str__": lambda self: "current"})()
    default = SimpleNamespace(wait_stream=lambda other: log.append(f"default waits for {other}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append("memory waits"))
    backend = TorchBackend()
    logits = backend.allocate((2, 3), "float32").copy_out()
    assert sorted(log) == sorted(expected)
    backend.concatenate([logits, logits])
    assert sorted(log) == sorted(2 * expected)


def test_calls_before_a_capture_wait_for_what_was_enqueued(monkeypatch):
    """They run on a stream of their own, and what fills their buffers is on the current one."""
    log, fake = [], lambda *arguments, **options: nullcontext()
    stream = SimpleNamespace(wait_stream=lambda other: log.append(f"wait for {other}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the current one of {device}")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda keep_graph: SimpleNamespace(raw_cuda_graph=lambda: 0x1000))
    for name in ("graph_pool_handle", "device", "stream", "synchronize", "graph"):
        monkeypatch.setattr(torch.cuda, name, fake)
    engine = SimpleNamespace(bind=lambda inputs, outputs: lambda: log.append("call"))
    TorchCapturer(CudaDevice(FakeDriver(), 0)).capture(engine, {}, {}, beside=False)
    assert log == ["wait for the current one of 0", *["call"] * 4]


def test_capture_that_fails_leaves_the_current_stream(monkeypatch):
    """PyTorch 2.11 does not put it back: `torch.cuda.graph.__exit__` ends the capture first, and that raises."""
    now = ["the caller's"]

    @contextmanager
    def stream(name):
        before, now[0] = now[0], name
        try:
            yield
        finally:
            now[0] = before

    class Capturing:
        def __init__(self, graph, *, stream, **options):
            self._stream = stream

        def __enter__(self):
            now[0] = self._stream

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    of_capture = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: of_capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda keep_graph: None)
    for name, value in {"stream": stream, "graph": Capturing, "device": nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("graph_pool_handle", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    engine = SimpleNamespace(bind=lambda inputs, outputs: lambda: None)
    with pytest.raises(EngineError, match="previous error during capture"):
        TorchCapturer(CudaDevice(FakeDriver(), 0)).capture(engine, {}, {}, beside=False)
    assert now == ["the caller's"]


def test_staging_memory_is_filled_when_what_it_held_has_arrived(monkeypatch):
    """A GPU reads page-locked memory after the call that enqueues the copy."""
    log = []
    event = SimpleNamespace(synchronize=lambda: log.append("arrived"), record=lambda stream: log.append("sent"))
    stream = SimpleNamespace(synchronize=lambda: log.append("done"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device, pin_memory: empty_like(tensor, device=device))
    tensor = torch.zeros(2, 3)
    staging = torch_buffer._Staging(tensor)
    for value in (1, 2):
        staging.filled(np.full((2, 3), value, np.float32)).to_device()
        assert tensor.unique().tolist() == [value]
    assert log == ["sent", "arrived", "sent"]
    buffer = torch_buffer.TorchBuffer(tensor, CopyWatch())
    buffer._staging = staging
    begun = buffer.begin_read()
    assert log[3:] == []
    buffer.read()
    assert log[3:] == ["done"]
    assert begun.tolist() == [[2] * 3] * 2

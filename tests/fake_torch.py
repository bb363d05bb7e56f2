"""PyTorch on a GPU that is a stand-in: its tensors lie on the host, and its streams are those of `RaceDetector`.

Each operation that touches a tensor of "cuda:0" is work on PyTorch's current stream, and each tensor that is made there
belongs to that stream: once it is gone, the stream's next work may write where it was, as PyTorch's allocator says, and
what `record_stream` names is over by then. What is captured runs when its graph does.
"""

import ctypes
import itertools
import threading
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from engines import torchrt
from engines.cuda_device import CudaDevice

COPY, RECORD = torch.ops.aten.copy_.default, "record_stream"


class Stream:
    def __init__(self, gpu, number):
        self._gpu, self.cuda_stream = gpu, number

    def __eq__(self, other):
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self):
        return self.cuda_stream

    def wait_stream(self, other):
        self._gpu.driver.wait(self.cuda_stream, other.cuda_stream)

    def wait_event(self, event):
        self._gpu.driver.wait_for(self.cuda_stream, event.over)

    def synchronize(self):
        self._gpu.driver.wait_on_host(self._gpu.driver.reach(self.cuda_stream)[1])


class FakeTorch:
    """Patches `torch.cuda` and the backend `torch`; within `running()` a thread's tensors may be on the GPU."""

    def __init__(self, monkeypatch, driver):
        self.driver, self._current = driver, threading.local()
        self._storages, self._numbers = {}, itertools.count(0x1000)
        self._pinned = {}
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                self.over = None

            def record(self, stream=None):
                self.over = dict(driver.reach((stream or gpu.current()).cuda_stream)[1])

            def synchronize(self):
                driver.wait_on_host(self.over)

            def elapsed_time(self, end):
                driver.require_passed(self.over)
                driver.require_passed(end.over)
                return 1.0

        class Graph:
            def __init__(self, keep_graph):
                assert keep_graph

            def raw_cuda_graph(self):
                return self.raw

        pools = itertools.count(0x10000)
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_stream": lambda device=None: self.current(),
            "default_stream": lambda device=None: Stream(self, 0),
            "ExternalStream": lambda number, device=None: Stream(self, number),
            "Stream": lambda device=None: Stream(self, next(self._numbers)),
            "Event": Event,
            "stream": self.stream,
            "device": lambda index: nullcontext(),
            "synchronize": lambda device=None: self.synchronize(),
            "CUDAGraph": Graph,
            "graph": self._captured,
            "graph_pool_handle": lambda: next(pools),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self._storage(tensor)[2].add(stream))
        monkeypatch.setattr(torchrt, "open_device", lambda device, stream: CudaDevice(driver, 0, stream=stream))
        bind = torchrt.TorchEngine.bind
        monkeypatch.setattr(torchrt.TorchEngine, "bind", lambda *arguments: self._bound(bind(*arguments)))
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    # --- streams ------------------------------------------------------------------------------------------------------

    def current(self):
        return self._current.__dict__.setdefault("stream", Stream(self, 0))

    @contextmanager
    def stream(self, stream):
        outer, self._current.stream = self.current(), stream
        try:
            yield
        finally:
            self._current.stream = outer

    def synchronize(self):
        for stream in list(self.driver.streams()):
            self.driver.wait_on_host(self.driver.reach(stream)[1])

    @contextmanager
    def _captured(self, graph, pool, stream, capture_error_mode):
        self.synchronize()
        mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with self.stream(stream):
            self.driver.cuStreamBeginCapture(stream.cuda_stream, mode)
            self._pool = pool
            yield
            graph.raw = int(self.driver.cuStreamEndCapture(stream.cuda_stream)[1])

    def _bound(self, call):
        """Return a call that becomes a node where its stream is captured, whose own tensors are in the pool."""

        def bound():
            number = self.current().cuda_stream
            if not self.driver._is_captured(number):
                return call()
            pool = self._pool

            def work():
                self.driver.access(pool, 1, writes=True)
                call()

            return self.driver.enqueue(work, stream=number)

        return bound

    # --- tensors ------------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self):
        with ExitStack() as stack:
            stack.enter_context(_Devices(self))
            stack.enter_context(_Accesses(self))
            yield

    def is_on_gpu(self, tensor):
        return self._storage(tensor) is not None

    def is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _storage(self, tensor):
        storage = tensor.untyped_storage()
        found = self._storages.get(storage.data_ptr())
        return found if found is not None and not found[0].expired() else None

    def put(self, tensor, *, is_ours=True):
        """Note a tensor on the GPU, which belongs to the current stream, or to nobody of PyTorch."""
        self.collect()
        storage = tensor.untyped_storage()
        if storage.nbytes() and self.driver.is_idle():
            stream = self.current().cuda_stream if is_ours else None
            address, n_bytes = storage.data_ptr(), storage.nbytes()
            self._storages[address] = (StorageWeakRef(storage), stream, set(), n_bytes)
            if is_ours:  # for kernels, which have its address alone
                self.driver.memory[address] = np.frombuffer((ctypes.c_uint8 * n_bytes).from_address(address), np.uint8)
        return tensor

    def upload(self, tensor):
        """Note a tensor that came to the GPU; the last of that may be a kernel, for which the host does not wait."""
        self.put(tensor)
        with self.driver.on(self.current().cuda_stream):
            self.driver.access(*_range(tensor), writes=True)
        return tensor

    def pin(self, tensor):
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor  # PyTorch frees it when its copies are done
        return tensor

    def collect(self):
        """Let the streams have what is free."""
        if not self.driver.is_idle():
            return
        for address, (storage, stream, others, n_bytes) in list(self._storages.items()):
            if storage.expired():
                del self._storages[address]
                if stream is not None:  # else it is the caller's, who has it still
                    del self.driver.memory[address]
                    for other in others:
                        self.driver.wait(stream, other.cuda_stream)
                    with self.driver.on(stream):
                        self.driver.access(address, n_bytes, writes=True)
                    self.driver.drop(address, n_bytes)

    def note(self, func, arguments, result):
        """Note what an operation did, if that was on the GPU."""
        schema = func._schema
        if any(item.alias_info is not None and not item.alias_info.is_write for item in schema.returns):
            return  # a view
        given = [
            (tensor, item.alias_info is not None and item.alias_info.is_write)
            for item, value in zip(schema.arguments, arguments, strict=False)
            for tensor in tree_leaves(value)
            if isinstance(tensor, torch.Tensor)
        ]
        here = [(tensor, writes) for tensor, writes in given if self.is_on_gpu(tensor)]
        if not here:
            return
        if self.driver.is_idle():  # in a graph they are in its pool
            made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and not self.is_on_gpu(t)]
            here += [(self.put(t), True) for t in made if all(t is not tensor for tensor, _ in given)]
        with nullcontext() if not self.driver.is_idle() else self.driver.on(self.current().cuda_stream):
            for tensor, writes in here:
                self.driver.access(*_range(tensor), writes=writes)
            if func is COPY:
                target, source = arguments[:2]
                if self.is_pinned(source):
                    self.driver.take_from_host(*_range(source))
                elif self.is_pinned(target):
                    self.driver.bring_to_host(*_range(target))
        if func is COPY and len(here) < 2 and not (len(arguments) > 2 and arguments[2]):
            self.current().synchronize()  # with memory of the host's that is not page-locked

    def from_interface(self, values):
        interface = values.__cuda_array_interface__
        shape, dtype, (address, _) = interface["shape"], np.dtype(interface["typestr"]), interface["data"]
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        [memory] = [
            array[address - start : address - start + n_bytes]
            for start, array in self.driver.memory.items()
            if start <= address and address + n_bytes <= start + array.nbytes
        ]
        return self.put(torch.from_numpy(memory.view(dtype).reshape(shape)), is_ours=False)


class _Devices(TorchFunctionMode):
    """Puts what goes to the GPU on the host, and says that it is on the GPU."""

    def __init__(self, gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func, types, arguments=(), options=None):
        options = dict(options or {})
        if func == torch.Tensor.is_cuda.__get__:
            return self._gpu.is_on_gpu(arguments[0])
        if func == torch.Tensor.device.__get__ and self._gpu.is_on_gpu(arguments[0]):
            return torch.device("cuda:0")
        if func is torch.as_tensor and hasattr(arguments[0], "__cuda_array_interface__"):
            return self._gpu.from_interface(arguments[0])
        is_pinned = options.pop("pin_memory", False)
        goes_there = any(_is_gpu(value) for value in (*arguments, *options.values()))
        result = func(*tree_map(_host, arguments), **tree_map(_host, options))
        if is_pinned:
            return self._gpu.pin(result)
        if func is torch.Tensor.cpu:
            self._gpu.current().synchronize()
            return result.clone()
        return self._gpu.upload(result) if goes_there and not self._gpu.is_on_gpu(result) else result


class _Accesses(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func, types, arguments=(), options=None):
        self._gpu.driver.require_unchanged()
        self._gpu.collect()
        result = func(*arguments, **(options or {}))
        self._gpu.note(func, arguments, result)
        return result


def _is_gpu(value):
    return isinstance(value, torch.device) and value.type == "cuda"


def _host(value):
    return torch.device("cpu") if _is_gpu(value) else value


def _range(tensor):
    """Return the address and the number of bytes of what a tensor spans."""
    last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.itemsize if tensor.numel() else 0

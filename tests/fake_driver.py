"""A stand-in for `cuda.bindings.driver` that notes what it is told and does it, on host memory.

Device addresses are addresses of numpy arrays, and a copy outside of what was allocated fails. Work that is enqueued
runs at once, or, while the stream is captured, becomes a node of a graph; a launch runs the graph's nodes. The kernels
run as their Python twins. What copies, launches and conditional nodes take can be set. Structures and enumerations are
the real ones: what reaches the driver is read back from their memory, at the offsets that cuda.h gives them.
"""

import ctypes
import threading
from collections import Counter

import numpy as np
import pytest

from engines.dispatch import MAX_BLOCKS, branches, dispatch, lookup


class Handles(ctypes.Structure):
    _fields_ = [("h", ctypes.c_uint64 * MAX_BLOCKS)]


COPY_OFFSETS = dict(
    zip(  # of CUDA_MEMCPY3D, as cuda.h has it
        ("source kind", "source", "target kind", "target", "width", "height", "depth"),
        (32, 48, 120, 136, 176, 184, 192),
        strict=True,
    )
)
POINTER, HANDLE = ctypes.c_uint64, ctypes.c_uint64
KERNELS = {  # by the address of the function: what its node is noted as, and the types of its arguments
    0xF: ("kernel", [POINTER] * 3 + [ctypes.c_int, ctypes.c_float, ctypes.c_int, POINTER, Handles]),
    0x10: ("lookup", [POINTER] * 2 + [ctypes.c_int, ctypes.c_float, POINTER, ctypes.c_int, POINTER, HANDLE]),
    0x11: ("branch", [POINTER] * 3 + [ctypes.c_int, ctypes.c_float, POINTER, Handles, Handles]),
}


# They work in the context that is current: without one they fail, and an event of another one's cannot be put on the
# device's stream (CUDA driver API, `cuEventCreate` and `cuEventRecord`).
IN_CONTEXT = {
    *("cuStreamCreate", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuMemAlloc", "cuMemHostAlloc"),
    *("cuMemsetD8Async", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "cuModuleLoadData"),
}


class FakeDriver:
    """`failing` names a function that fails; `kinds` gives a graph, by address, nodes of these kinds."""

    def __init__(self):
        self._real = pytest.importorskip("cuda.bindings.driver")
        self.version = 13000
        self.failing = None
        self.calls = Counter()
        self.memory, self.host_memory = {}, {}  # address: array
        self.copies = []  # "HtoD", "DtoH" and "DtoD", in order
        self.graphs, self.handles, self.values = {}, [], {}
        self.owner_of_handle = {}
        self.kinds, self.instantiated, self.launched, self.destroyed = {}, [], [], []
        self.ended = []  # executables that were destroyed; they share the address of their graph
        self.owners = {}  # address: the context that it belongs to, where it is not the primary one
        self.ordinals = {}  # address: the number of its GPU, where it is not 0
        self.events, self.time_ms = [], 0.0  # each piece of work takes a millisecond, if nothing else is said
        self.launch_ms = self.conditional_ms = self.instantiate_ms = 0.0
        self.copy_ms = {"HtoD": 0.0, "DtoH": 0.0, "DtoD": 0.0}
        self.last_first = (
            False  # of nodes that wait for nothing more, which runs first: the order is nobody's to rely on
        )
        self.recorded_on, self.waited_for, self.held_back = {}, [], []  # streams
        self.launched_on = []  # streams
        self._capturing = None  # the stream that is captured, and the graph that its work goes to
        self._keep = []
        self._thread = threading.local()  # its stack of contexts

    def __getattr__(self, name):
        return getattr(self._real, name)

    def _done(self, name, *values):
        self.calls[name] += 1
        results = self.CUresult
        if name in IN_CONTEXT and not self._is_current():
            return results.CUDA_ERROR_INVALID_CONTEXT, *values
        return results.CUDA_ERROR_INVALID_VALUE if self.failing == name else results.CUDA_SUCCESS, *values

    def _is_current(self):
        return bool(self.contexts) and self.contexts[-1] == self.CUcontext(0xC0)

    # --- device, context, stream --------------------------------------------------------------------------------------

    def cuInit(self, flags):
        return self._done("cuInit")

    def cuDriverGetVersion(self):
        return self._done("cuDriverGetVersion", self.version)

    def cuDeviceGet(self, index):
        return self._done("cuDeviceGet", self.CUdevice(index))

    def cuDeviceGetAttribute(self, attribute, device):
        return self._done("cuDeviceGetAttribute", 9 if "MAJOR" in attribute.name else 0)

    def cuDevicePrimaryCtxRetain(self, device):
        return self._done("cuDevicePrimaryCtxRetain", self.CUcontext(0xC0))

    def cuDevicePrimaryCtxRelease(self, device):
        return self._done("cuDevicePrimaryCtxRelease")

    def cuCtxSetCurrent(self, context):
        self.contexts[-1:] = [context]
        return self._done("cuCtxSetCurrent")

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return self._done("cuCtxPushCurrent")

    def cuCtxPopCurrent(self):
        return self._done("cuCtxPopCurrent", self.contexts.pop())

    @property
    def contexts(self):
        """The calling thread's contexts, the current one last."""
        return self._thread.__dict__.setdefault("contexts", [])

    def _has_context(self):
        assert self._capturing is None, "nothing may be given back while work is captured"
        return bool(self.contexts)

    def cuStreamCreate(self, flags):
        assert flags == int(self.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return self._done("cuStreamCreate", self.CUstream(0x5 + 0x10 * self.calls["cuStreamCreate"]))

    def cuStreamDestroy(self, stream):
        return self._done("cuStreamDestroy")

    def cuStreamSynchronize(self, stream):
        assert not self._is_captured(stream), "a stream that is captured cannot be waited for"
        if not self.contexts:
            return (self.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        return self._done("cuStreamSynchronize")

    def cuEventCreate(self, flags):
        self.events.append(None)
        return self._done("cuEventCreate", self.CUevent(len(self.events)))

    def cuEventDestroy(self, event):
        return self._done("cuEventDestroy")

    def cuEventRecord(self, event, stream):
        assert not self._is_captured(stream), "no body of a conditional node may hold an event"
        self.events[int(event) - 1] = self.time_ms
        self.recorded_on[int(event)] = int(stream)
        return self._done("cuEventRecord")

    def cuEventSynchronize(self, event):
        assert int(event) in self.recorded_on
        return self._done("cuEventSynchronize")

    def cuEventElapsedTime(self, start, end):
        if not self.contexts:
            return self.CUresult.CUDA_ERROR_INVALID_CONTEXT, 0.0
        return self._done("cuEventElapsedTime", self.events[int(end) - 1] - self.events[int(start) - 1])

    def cuStreamWaitEvent(self, stream, event, flags):
        self.waited_for.append(self.recorded_on[int(event)])
        self.held_back.append(int(stream))
        return self._done("cuStreamWaitEvent")

    def cuPointerGetAttribute(self, attribute, address):
        if attribute == self.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            return self._done("cuPointerGetAttribute", self.ordinals.get(address, 0))
        assert attribute == self.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT
        return self._done("cuPointerGetAttribute", self.CUcontext(self.owners.get(address, 0xC0)))

    # --- memory -------------------------------------------------------------------------------------------------------

    def cuMemAlloc(self, n_bytes):
        array = np.full(n_bytes, 0xAB, np.uint8)
        self.memory[array.ctypes.data] = array
        return self._done("cuMemAlloc", self.CUdeviceptr(array.ctypes.data))

    def cuMemHostAlloc(self, n_bytes, flags):
        array = np.full(n_bytes, 0xCD, np.uint8)
        self.host_memory[array.ctypes.data] = array
        return self._done("cuMemHostAlloc", array.ctypes.data)

    def cuMemFreeHost(self, address):
        if not self._has_context():
            return (self.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        del self.host_memory[address]
        return self._done("cuMemFreeHost")

    def cuMemGetInfo(self):
        used = sum(array.nbytes for array in self.memory.values())
        return self._done("cuMemGetInfo", 2**40 - used, 2**40)

    def cuMemFree(self, address):
        if not self._has_context():
            return (self.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        del self.memory[int(address)]
        return self._done("cuMemFree")

    def cuMemsetD8Async(self, address, value, n_bytes, stream):
        self.view(int(address), n_bytes)[:] = value
        return self._done("cuMemsetD8Async")

    def view(self, address, n_bytes):
        """Return that piece of device memory; it must lie within one allocation."""
        for start, array in self.memory.items():
            if start <= address and address + n_bytes <= start + array.nbytes:
                return array[address - start : address - start + n_bytes]
        raise AssertionError(f"{n_bytes} bytes at {address:#x} are not device memory")

    def cuMemcpyHtoDAsync(self, target, source, n_bytes, stream):
        self._require_host(source, n_bytes)
        self.view(target, n_bytes)[:] = np.frombuffer(ctypes.string_at(source, n_bytes), np.uint8)
        return self._copied("HtoD")

    def cuMemcpyDtoHAsync(self, target, source, n_bytes, stream):
        self._require_host(target, n_bytes)
        ctypes.memmove(target, self.view(source, n_bytes).ctypes.data, n_bytes)
        return self._copied("DtoH")

    def cuMemcpyDtoDAsync(self, target, source, n_bytes, stream):
        self.view(target, n_bytes)[:] = self.view(source, n_bytes)
        return self._copied("DtoD")

    def _require_host(self, address, n_bytes):
        within = any(
            start <= address and address + n_bytes <= start + a.nbytes for start, a in self.host_memory.items()
        )
        assert within, f"{n_bytes} bytes at {address:#x} are not page-locked"

    def _copied(self, direction):
        self.copies.append(direction)
        self.time_ms += self.copy_ms[direction]
        return self._done(f"cuMemcpy{direction}Async")

    # --- captured work ------------------------------------------------------------------------------------------------

    def enqueue(self, work, ms=1, stream=0x5):
        """Do what an engine does when it puts work on a stream; of one that is captured a graph gets it instead."""
        if self._is_captured(stream):
            self._note(self._capturing[1], None, 0, ("work", work, ms))
        else:
            self.time_ms += self.launch_ms
            self._work(work, ms)

    def _is_captured(self, stream):
        return self._capturing is not None and self._capturing[0] == int(stream)

    def _work(self, work, ms):
        work()
        self.time_ms += ms

    def cuStreamBeginCapture(self, stream, mode):
        assert mode == self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._capturing = int(stream), self._new_graph()
        return self._done("cuStreamBeginCapture")

    def cuStreamEndCapture(self, stream):
        (captured, graph), self._capturing = self._capturing, None
        assert captured == int(stream)
        return self._done("cuStreamEndCapture", graph)

    # --- graphs -------------------------------------------------------------------------------------------------------

    def _new_graph(self):
        address = 0x1000 * (len(self.graphs) + 1)
        self.graphs[address] = []
        return self.CUgraph(address)

    def cuGraphCreate(self, flags):
        return self._done("cuGraphCreate", self._new_graph())

    def cuGraphConditionalHandleCreate(self, graph, context, default, flags):
        assert (int(context), default, flags) == (0xC0, 0, self.CU_GRAPH_COND_ASSIGN_DEFAULT)
        self.handles.append(100 + len(self.handles))
        self.owner_of_handle[self.handles[-1]] = int(graph)
        return self._done("cuGraphConditionalHandleCreate", self.CUgraphConditionalHandle(self.handles[-1]))

    def _note(self, graph, after, count, entry):
        assert len(after or []) == count
        nodes = self.graphs[int(graph)]
        nodes.append((entry, [int(node) for node in after or []]))
        return self.CUgraphNode(int(graph) + len(nodes))

    def cuGraphAddChildGraphNode(self, graph, after, count, child):
        return self._done("cuGraphAddChildGraphNode", self._note(graph, after, count, ("child", int(child))))

    def cuGraphAddNode(self, graph, after, *arguments):
        *edges, count, params = arguments
        assert edges == [] if hasattr(self, "cuGraphAddNode_v2") else edges == [None]  # bindings of CUDA 12, and of 13
        raw = ctypes.string_at(params.getPtr(), 64)
        if int.from_bytes(raw[:4], "little") == int(self.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL):
            kind, types = KERNELS[int(params.kernel.func)]
            entry = (kind, self._arguments(int(params.kernel.kernelParams), types))
        else:
            handle, kind, size = (int.from_bytes(raw[a:b], "little") for a, b in ((16, 24), (24, 28), (28, 32)))
            kinds = self.CUgraphConditionalNodeType
            assert kind == int(kinds.CU_GRAPH_COND_TYPE_SWITCH) or (size, kind) == (1, int(kinds.CU_GRAPH_COND_TYPE_IF))
            bodies = [int(self._new_graph()) for _ in range(size)]
            memory = (ctypes.c_void_p * size)(*bodies)
            self._keep.append(memory)
            ctypes.c_void_p.from_address(params.getPtr() + 32).value = ctypes.addressof(memory)  # phGraph_out
            entry = ("switch" if kind == int(kinds.CU_GRAPH_COND_TYPE_SWITCH) else "if", handle, bodies)
        return self._done("cuGraphAddNode", self._note(graph, after, count, entry))

    def cuGraphAddMemcpyNode(self, graph, after, count, params, context):
        assert int(context) == 0xC0
        raw = ctypes.string_at(params.getPtr(), 200)
        at = {name: int.from_bytes(raw[i : i + 8], "little") for name, i in COPY_OFFSETS.items()}
        device = int(self.CUmemorytype.CU_MEMORYTYPE_DEVICE)
        assert (at["source kind"], at["target kind"], at["height"], at["depth"]) == (device, device, 1, 1)
        entry = ("copy", at["target"], at["source"], at["width"])
        return self._done("cuGraphAddMemcpyNode", self._note(graph, after, count, entry))

    def _arguments(self, pointers, types):
        """Read a kernel's arguments back, as the driver does when the node is added."""
        addresses = (ctypes.c_void_p * len(types)).from_address(pointers)
        values = [kind.from_address(address) for kind, address in zip(types, addresses, strict=True)]
        return [list(value.h) if isinstance(value, Handles) else value.value for value in values]

    def cuGraphGetNodes(self, graph, count):
        kinds = self.kinds.get(int(graph), ["KERNEL", "KERNEL", "MEMCPY"])
        return self._done("cuGraphGetNodes", kinds[:count], len(kinds))

    def cuGraphNodeGetType(self, node):
        return self._done("cuGraphNodeGetType", getattr(self.CUgraphNodeType, f"CU_GRAPH_NODE_TYPE_{node}"))

    def cuGraphInstantiateWithParams(self, graph, params):
        self.instantiated.append(int(graph))
        self.time_ms += self.instantiate_ms
        return self._done("cuGraphInstantiateWithParams", self.CUgraphExec(int(graph)))

    def cuGraphDestroy(self, graph):
        self.destroyed.append(int(graph))
        return self._done("cuGraphDestroy")

    def cuGraphExecDestroy(self, executable):
        self.destroyed.append(int(executable))
        self.ended.append(int(executable))
        return self._done("cuGraphExecDestroy")

    def cuGraphLaunch(self, executable, stream):
        assert int(executable) not in self.ended
        assert self.contexts, "each context has a default stream of its own"
        self.launched.append(int(executable))
        self.launched_on.append(int(stream))
        self.values = dict.fromkeys(self.handles, 0)  # each launch begins with the default value
        self.time_ms += self.launch_ms
        self._run(int(executable))
        return self._done("cuGraphLaunch")

    def _run(self, graph):
        """Run the nodes, on a clock by which each begins when those are done that it waits for."""
        began, done = self.time_ms, {}
        left = {graph + number: node for number, node in enumerate(self.graphs[graph], 1)}
        while left:
            ready = [node for node, (_, after) in left.items() if all(other in done for other in after)]
            node = ready[-1 if self.last_first else 0]
            entry, after = left.pop(node)
            self.time_ms = max((done[other] for other in after), default=began)
            self._run_node(entry)
            done[node] = self.time_ms
        self.time_ms = max(done.values(), default=began)

    def _run_node(self, entry):
        match entry:
            case ("work", work, ms):
                self._work(work, ms)
            case ("child", child):
                self._run(child)
            case ("kernel", arguments):
                self._dispatch(*arguments)
            case ("lookup", arguments):
                self._lookup(*arguments)
            case ("branch", arguments):
                self._branch(*arguments)
            case ("copy", target, source, n_bytes):
                self.view(target, n_bytes)[:] = self.view(source, n_bytes)
            case ("switch", handle, bodies):
                self.time_ms += self.conditional_ms
                if self.values[handle] < len(bodies):
                    self._run(bodies[self.values[handle]])
            case ("if", handle, [body]):
                self.time_ms += self.conditional_ms
                if self.values[handle]:
                    self._run(body)
            case _:
                raise AssertionError(f"nobody knows how to run {entry}")

    def _dispatch(self, probability, has_shortcut, force, n_blocks, threshold, blocks_per_switch, kept, switches):
        p, shortcut = self.view(probability, 4 * n_blocks).view(np.float32), self.view(has_shortcut, n_blocks)
        forced = self.view(force, n_blocks) if force else None
        result = dispatch(p, shortcut, threshold=threshold, force=forced, blocks_per_switch=blocks_per_switch)
        self.view(kept, n_blocks)[:] = result.kept
        self.values |= dict(zip(switches, result.switches, strict=False))

    def _branch(self, probability, has_shortcut, force, n_blocks, threshold, kept, keeps, drops):
        p, shortcut = self.view(probability, 4 * n_blocks).view(np.float32), self.view(has_shortcut, n_blocks)
        forced = self.view(force, n_blocks) if force else None
        result = branches(p, shortcut, threshold=threshold, force=forced)
        self.view(kept, n_blocks)[:] = result.kept
        self.values |= dict(zip(keeps, result.keeps, strict=False))
        self.values |= {drops[k]: drop for k, drop in enumerate(result.drops) if drop is not None}

    def _lookup(self, probability, force, n_blocks, threshold, masks, n_masks, kept, path):
        p, words = self.view(probability, 4 * n_blocks).view(np.float32), self.view(masks, 16 * n_masks)
        forced = self.view(force, n_blocks) if force else None
        table = [tuple(row) for row in words.view(np.uint64).reshape(-1, 2).tolist()]
        assert table == sorted(table)
        result = lookup(p, table, threshold=threshold, force=forced)
        self.view(kept, n_blocks)[:] = result.kept
        self.values[path] = result.path

    def cuModuleLoadData(self, image):
        assert image[:4] == b"\x7fELF"
        return self._done("cuModuleLoadData", self.CUmodule(0xD))

    def cuModuleUnload(self, module):
        return self._done("cuModuleUnload")

    def cuModuleGetFunction(self, module, name):
        addresses = {b"bd_dispatch": 0xF, b"bd_lookup": 0x10, b"bd_branch": 0x11}
        return self._done("cuModuleGetFunction", self.CUfunction(addresses[name]))

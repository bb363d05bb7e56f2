"""A stand-in for `cuda.bindings.driver` that notes what it is told and does it, on host memory (`FakeDevice`).

Work that is enqueued while its stream is captured becomes a node of a graph; a launch runs the graph's nodes. The
kernels run as their Python twins. What launches and conditional nodes take can be set. Structures and enumerations are
the real ones: what reaches the driver is read back from their memory, at the offsets that cuda.h gives them.
"""

import ctypes
from contextlib import nullcontext

import numpy as np

from engines.dispatch import MAX_BLOCKS
from tests.dispatch_twin import dispatch, lookup
from tests.fake_device import FakeDevice


class Handles(ctypes.Structure):
    _fields_ = [("h", ctypes.c_uint64 * MAX_BLOCKS)]


POINTER, HANDLE = ctypes.c_uint64, ctypes.c_uint64
KERNELS = {  # by the address of the function: what its node is noted as, and the types of its arguments
    0xF: ("kernel", [POINTER] * 3 + [ctypes.c_int, ctypes.c_float, ctypes.c_int, POINTER, Handles]),
    0x10: ("lookup", [POINTER] * 2 + [ctypes.c_int, ctypes.c_float, POINTER, ctypes.c_int, POINTER, HANDLE]),
}


class FakeDriver(FakeDevice):
    """`kinds` gives a graph, by address, nodes of these kinds."""

    def __init__(self):
        super().__init__()
        self.graphs, self.handles, self.values = {}, [], {}
        self.owner_of_handle = {}
        self.kinds, self.instantiated, self.launched, self.destroyed = {}, [], [], []
        self.ended = []  # executables that were destroyed; they share the address of their graph
        self.launched_on = []  # streams
        self.conditional_ms = self.instantiate_ms = 0.0
        # of nodes that wait for nothing more, which runs first: the order is nobody's to rely on
        self.last_first = False
        self._keep = []

    # --- captured work ------------------------------------------------------------------------------------------------

    def enqueue(self, work, ms=1, stream=0x5):
        """Do what an engine does when it puts work on a stream; of one that is captured a graph gets it instead."""
        if self._is_captured(stream):
            graph = self._capturing[1]
            last = [int(graph) + len(self.graphs[int(graph)])] if self.graphs[int(graph)] else []
            self._note(graph, last, len(last), ("work", work, ms))
        else:
            self.time_ms += self.launch_ms
            self._work(work, ms)

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
            assert kind == int(self.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH)
            bodies = [int(self._new_graph()) for _ in range(size)]
            memory = (ctypes.c_void_p * size)(*bodies)
            self._keep.append(memory)
            ctypes.c_void_p.from_address(params.getPtr() + 32).value = ctypes.addressof(memory)  # phGraph_out
            entry = ("switch", handle, bodies)
        return self._done("cuGraphAddNode", self._note(graph, after, count, entry))

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
            with self._node(node, after):
                self._run_node(entry)
            done[node] = self.time_ms
        self.time_ms = max(done.values(), default=began)

    def _node(self, node, after):
        """Return a `with` for the work of a node of the graph that runs, which waits for the nodes `after`."""
        return nullcontext()

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
            case ("switch", handle, bodies):
                self.time_ms += self.conditional_ms
                if self.values[handle] < len(bodies):
                    self._run(bodies[self.values[handle]])
            case _:
                raise AssertionError(f"nobody knows how to run {entry}")

    def _dispatch(self, probability, has_shortcut, force, n_blocks, threshold, blocks_per_switch, kept, switches):
        p, shortcut = self.view(probability, 4 * n_blocks).view(np.float32), self.view(has_shortcut, n_blocks)
        forced = self.view(force, n_blocks) if force else None
        result = dispatch(p, shortcut, threshold=threshold, force=forced, blocks_per_switch=blocks_per_switch)
        self.view(kept, n_blocks, writes=True)[:] = result.kept
        self.values |= dict(zip(switches, result.switches, strict=False))

    def _lookup(self, probability, force, n_blocks, threshold, masks, n_masks, kept, path):
        p, words = self.view(probability, 4 * n_blocks).view(np.float32), self.view(masks, 16 * n_masks)
        forced = self.view(force, n_blocks) if force else None
        table = [tuple(row) for row in words.view(np.uint64).reshape(-1, 2).tolist()]
        assert table == sorted(table)
        result = lookup(p, table, threshold=threshold, force=forced)
        self.view(kept, n_blocks, writes=True)[:] = result.kept
        self.values[path] = result.path

    def cuModuleLoadData(self, image):
        assert image[:4] == b"\x7fELF"
        return self._done("cuModuleLoadData", self.CUmodule(0xD))

    def cuModuleUnload(self, module):
        return self._done("cuModuleUnload")

    def cuModuleGetFunction(self, module, name):
        addresses = {b"bd_dispatch": 0xF, b"bd_lookup": 0x10}
        return self._done("cuModuleGetFunction", self.CUfunction(addresses[name]))

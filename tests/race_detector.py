"""A stand-in for the driver that finds races: work runs at once, as in `FakeDriver`, but `HappensBefore` notes it.

In order is what was enqueued on one stream, what an event, the host or the default stream waited for, and within a
graph what its edges say.

Sources: CUDA driver API, "API synchronization behavior", "Stream synchronization behavior" and `cuGraphLaunch`.
`cuMemFree` waits for all work (CUDA programming guide, "Stream-Ordered Memory Allocator"); nothing else is taken to be
over by that. That a TensorRT context must outlast its work is said by its users (pytorch/TensorRT, pull request 4314).
"""

import itertools
import threading
from contextlib import contextmanager
from functools import wraps

from tests.fake_driver import FakeDriver
from tests.happens_before import HappensBefore, join


class RaceDetector(HappensBefore, FakeDriver):
    """Streams are `blocking` as `HappensBefore` has it, where that is said."""

    def __init__(self, *, blocking=()):
        HappensBefore.__init__(self, blocking=blocking)
        FakeDriver.__init__(self)
        self._passed, self._launched = {}, {}  # what is over when an event is passed, and when a graph has run
        self._nodes, self._ran, self._numbers = {}, frozenset(), itertools.count()
        self._lock = threading.RLock()

    # --- streams, events, the host ------------------------------------------------------------------------------------

    def enqueue(self, work, ms=1, stream=0x5):
        if self._is_captured(stream):
            return super().enqueue(work, ms, stream)
        with self.on(stream):
            return super().enqueue(work, ms, stream)

    def cuStreamSynchronize(self, stream):
        self.wait_on_host(self.reach(stream)[1])
        return super().cuStreamSynchronize(stream)

    def cuEventRecord(self, event, stream):
        self._passed[int(event)] = dict(self.reach(stream)[1])
        return super().cuEventRecord(event, stream)

    def cuEventSynchronize(self, event):
        self.wait_on_host(self._passed[int(event)])
        return super().cuEventSynchronize(event)

    def cuStreamWaitEvent(self, stream, event, flags):
        join(self.reach(stream)[1], self._passed[int(event)])
        return super().cuStreamWaitEvent(stream, event, flags)

    def cuEventElapsedTime(self, start, end):
        for event in (start, end):
            self.require_passed(self._passed[int(event)])
        return super().cuEventElapsedTime(start, end)

    # --- graphs -------------------------------------------------------------------------------------------------------

    def cuGraphLaunch(self, executable, stream):
        with self.on(stream, self._launched.get(int(executable), ())) as over:  # it never runs beside itself
            result = super().cuGraphLaunch(executable, stream)
            self._launched[int(executable)] = dict(over)
            return result

    def _run(self, graph):
        outer, self._nodes = self._nodes, {}
        super()._run(graph)
        self._ran = frozenset().union(*self._nodes.values())
        self._nodes = outer

    @contextmanager
    def _node(self, node, after):
        outer = self._node_number, self._nodes_over
        self._nodes_over = self._nodes_over.union(*(self._nodes[other] for other in after))
        self._node_number, self._ran = next(self._numbers), frozenset()
        try:
            yield
        finally:
            self._nodes[node] = self._nodes_over | {self._node_number} | self._ran
            self._node_number, self._nodes_over = outer

    def _run_node(self, entry):
        match entry:
            case ("switch", handle, _):
                self.access(-handle, 1, writes=False)
            case ("kernel", [*_, handles]):
                self._set(handles)
            case ("lookup", [*_, handle]):
                self._set([handle])
        super()._run_node(entry)

    def _set(self, handles):
        for handle in filter(None, handles):
            self.access(-handle, 1, writes=True)

    # --- memory -------------------------------------------------------------------------------------------------------

    def view(self, address, n_bytes, *, writes=False):
        if self._stream is not None:
            self.access(address, n_bytes, writes=writes)
        return super().view(address, n_bytes, writes=writes)

    def use(self, thing):
        self.access(-id(thing), 1, writes=True)

    def forget(self, thing):
        self.give_back(-id(thing), 1)

    def cuMemAlloc(self, n_bytes):
        status, address = super().cuMemAlloc(n_bytes)
        self.drop(int(address), n_bytes)
        return status, address

    def cuMemFree(self, address):
        self.drop(int(address), self.memory[int(address)].nbytes)
        return super().cuMemFree(address)

    def cuMemFreeHost(self, address):
        n_bytes = self.host_memory[address].nbytes
        self.give_back(address, n_bytes)
        self.require_unchanged()
        for copies in (self._taken, self._brought):
            copies[:] = [copy for copy in copies if not address <= copy.address < address + n_bytes]
        return super().cuMemFreeHost(address)

    def cuMemsetD8Async(self, address, value, n_bytes, stream):
        with self.on(stream):
            return super().cuMemsetD8Async(address, value, n_bytes, stream)

    def cuMemcpyDtoDAsync(self, target, source, n_bytes, stream):
        with self.on(stream):
            return super().cuMemcpyDtoDAsync(target, source, n_bytes, stream)

    def cuMemcpyHtoDAsync(self, target, source, n_bytes, stream):
        with self.on(stream):
            self.take_from_host(source, n_bytes)
            return super().cuMemcpyHtoDAsync(target, source, n_bytes, stream)

    def cuMemcpyDtoHAsync(self, target, source, n_bytes, stream):
        with self.on(stream):
            result = super().cuMemcpyDtoHAsync(target, source, n_bytes, stream)
            self.bring_to_host(target, n_bytes)
            return result


def _locked(function):
    """Let one thread at a time call it, as the driver does."""

    @wraps(function)
    def locked(self, *arguments, **options):
        with self._lock:
            return function(self, *arguments, **options)

    return locked


_ENTRIES = [name for name in dir(RaceDetector) if name.startswith("cu")]
for _entry in (*_ENTRIES, "enqueue", "forget", "wait", "wait_for", "wait_on_host"):
    setattr(RaceDetector, _entry, _locked(getattr(RaceDetector, _entry)))

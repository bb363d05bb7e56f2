"""What is over before what, on a device whose work is only enqueued, and what races with what for want of it.

Each access to memory is noted with how much of every stream's work is over by then for sure (a vector clock, as Lamport
has it). Two accesses to the same bytes, one of them a write, of which neither is over before the other are a race, in
whatever order they really ran.

What the host does with page-locked memory cannot be noted. So what a copy brings there arrives only when the host has
waited for it, and what a copy takes from there must be as it was until then.
"""

import ctypes
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

HOST, LEGACY, PER_THREAD = "the host", 1, 2
REPOSITORY = Path(__file__).resolve().parent.parent
STAND_INS = (
    "happens_before.py",
    "race_detector.py",
    "fake_driver.py",
    "fake_device.py",
    "fake_tensorrt.py",
    "fake_torch.py",
)


class Access(NamedTuple):
    begin: int
    end: int
    writes: bool
    stream: object
    number: int  # of the stream's work
    node: int | None  # of the graph that is launched
    place: str


class Copy(NamedTuple):
    """Between page-locked memory and the device; `values` are what it took from there, or what it brings."""

    stream: object
    number: int
    address: int
    values: bytes
    place: str

    def is_over(self, over):
        return over.get(self.stream, 0) >= self.number


class HappensBefore:
    """Work on streams, each piece of it within `on`.

    Args:
        blocking: streams that the default stream waits for, and that wait for it.
    """

    def __init__(self, *, blocking=()):
        self.races = []
        self.blocking = set(blocking)
        self._over = defaultdict(dict)  # by stream, and HOST: the work of each stream that is over before its next
        self._accesses, self._taken, self._brought = [], [], []
        self._stream = None  # whose work runs now
        self._node_number, self._nodes_over = None, frozenset()  # of the graph that runs: the node, and those behind it

    def check(self):
        """Fail where a race was found."""
        self.wait_on_host({})
        assert not self.races, "\n".join(self.races)

    def reach(self, stream):
        """Return the stream, and what is over before the next work on it."""
        name = LEGACY if int(stream) == 0 else int(stream)
        if name == PER_THREAD:
            name = f"thread {threading.get_ident()}"
            self.blocking.add(name)
        over = self._over[name]
        join(over, self._over[HOST])
        for other in self.blocking if name == LEGACY else {LEGACY} if name in self.blocking else ():
            join(over, self._over[other])
        return name, over

    @contextmanager
    def on(self, stream, after=()):
        self.require_unchanged()
        outer = self._stream
        self._stream, over = self.reach(stream)
        join(over, dict(after))
        over[self._stream] = over.get(self._stream, 0) + 1
        try:
            yield over
        finally:
            self._stream = outer

    def wait_on_host(self, over):
        """Note what the host has waited for; what was copied to the host is there now."""
        known = self._over[HOST]
        join(known, over)
        self.require_unchanged()
        self._taken = [copy for copy in self._taken if not copy.is_over(known)]
        for copy in self._brought:
            if copy.is_over(known):
                ctypes.memmove(copy.address, copy.values, len(copy.values))
        self._brought = [copy for copy in self._brought if not copy.is_over(known)]

    def require_unchanged(self):
        """Find what the host has written into memory that may still be copied from."""
        for copy in self._taken:
            if ctypes.string_at(copy.address, len(copy.values)) != copy.values:
                self._report(f"the host writes memory that is still copied from: {copy.place}")

    def _report(self, race):
        if race not in self.races:
            self.races.append(race)

    def wait(self, stream, other):
        """Let a stream wait for the work that is on another one, as by an event."""
        self.wait_for(stream, self.reach(other)[1])

    def wait_for(self, stream, over):
        join(self.reach(stream)[1], over)

    def require_passed(self, over):
        if any(self._over[HOST].get(stream, 0) < number for stream, number in over.items()):
            self._report(f"the time of an event that is not passed: {_place()}")

    def is_idle(self):
        """Say whether no work runs now."""
        return self._stream is None

    def streams(self):
        return [stream for stream in self._over if isinstance(stream, int)]

    def take_from_host(self, address, n_bytes):
        """Note that the work that runs now copies from page-locked memory."""
        self.access(address, n_bytes, writes=False)
        self._taken.append(self._copy(address, n_bytes))

    def bring_to_host(self, address, n_bytes):
        """Note that the work that runs now copied to page-locked memory; take it away until the host has waited."""
        self.access(address, n_bytes, writes=True)
        self._taken = [copy for copy in self._taken if not address <= copy.address < address + n_bytes]
        self._brought.append(self._copy(address, n_bytes))
        ctypes.memset(address, 0xCD, n_bytes)

    def _copy(self, address, n_bytes):
        number = self._over[self._stream][self._stream]
        return Copy(self._stream, number, address, ctypes.string_at(address, n_bytes), _place())

    def access(self, begin, n_bytes, *, writes):
        """Note an access of the work that runs now, and what it races with."""
        number = self._over[self._stream].get(self._stream, 0)
        access = Access(begin, begin + n_bytes, writes, self._stream, number, self._node_number, _place())
        kept = []
        for other in self._accesses:
            is_over = self._is_over(other)
            if other.begin < access.end and begin < other.end and (writes or other.writes) and not is_over:
                self._report(f"{_told(other)} | {_told(access)}")
            is_covered = begin <= other.begin and other.end <= access.end and (writes or not other.writes)
            if not (is_covered and is_over):  # who waits for this access has waited for that one
                kept.append(other)
        self._accesses = [*kept, access]

    def _is_over(self, other):
        over = self._over[self._stream]
        if (other.stream, other.number) == (self._stream, over.get(self._stream, 0)):
            return other.node in (None, self._node_number) or other.node in self._nodes_over
        return over.get(other.stream, 0) >= other.number

    def give_back(self, begin, n_bytes):
        """Note that the host gives something back."""
        outer, self._stream = self._stream, HOST
        self.access(begin, n_bytes, writes=True)
        self._stream = outer
        self.drop(begin, n_bytes)

    def drop(self, begin, n_bytes):
        self._accesses = [a for a in self._accesses if a.end <= begin or begin + n_bytes <= a.begin]


def join(over, other):
    for stream, number in other.items():
        over[stream] = max(over.get(stream, 0), number)


def _told(access):
    node = "" if access.node is None else f", node {access.node}"
    return f"{'write' if access.writes else 'read'} by {access.stream}{node}: {access.place}"


def _place():
    """Return the innermost lines of ours that are being called."""
    found, frame = [], sys._getframe(1)
    while frame is not None and len(found) < 3:
        if name := _name(frame.f_code.co_filename):
            found.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


@cache
def _name(filename):
    path = Path(filename)
    return str(path.relative_to(REPOSITORY)) if REPOSITORY in path.parents and path.name not in STAND_INS else ""

"""Time of calls and copies on the device, where they only enqueue: events on the stream before and after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from engines.base import Backend, Call

_Result = TypeVar("_Result")
Direction = Literal["h2d", "d2h"]  # host to device, and device to host, as trtexec has them


class Event(Protocol):
    """A point on a stream; `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Put it on the stream, after the work that is there."""

    def elapsed_time(self, end: Any, /) -> float:
        """Return the milliseconds from here to `end`, an event of the same kind, both of them passed."""


class CopyWatch:
    """What a backend's copies between host and device go through, for a timer to look at."""

    def __init__(self) -> None:
        self.timer: Callable[[Direction, Callable[[], Any]], Any] | None = None

    def run(self, direction: Direction, copy: Callable[[], _Result]) -> _Result:
        if self.timer is None:
            return copy()
        result: _Result = self.timer(direction, copy)
        return result


class DeviceTimer:
    """Times calls that enqueue. Their times are known once the device is done: at `collect`.

    Where the device waits for the host to enqueue the next call, that wait is part of a call's time.

    Args:
        copies: what the device's copies go through.
    """

    def __init__(
        self, new_event: Callable[[], Event], synchronize: Callable[[], None], copies: CopyWatch | None = None
    ) -> None:
        self._new_event = new_event
        self._synchronize = synchronize
        self._copies = CopyWatch() if copies is None else copies
        self._free: list[Event] = []
        self._pending: list[tuple[Event, Event, Callable[[float], None]]] = []

    def timed(self, call: Call, on_ms: Callable[[float], None]) -> Call:
        """Return `call` with an event on either side; `collect` hands its milliseconds to `on_ms`."""

        return lambda: self._time(call, on_ms)

    @contextmanager
    def timing_copies(self, on_ms: Callable[[Direction, float], None]) -> Iterator[None]:
        """Within it the device's copies are timed, too; `collect` hands each one's milliseconds to `on_ms`."""
        self._copies.timer = lambda direction, copy: self._time(copy, lambda ms: on_ms(direction, ms))
        try:
            yield
        finally:
            self._copies.timer = None

    def collect(self) -> None:
        """Wait for the device and hand out the times of all calls since the last time."""
        self._synchronize()
        for start, end, on_ms in self._pending:
            on_ms(start.elapsed_time(end))
            self._free += start, end
        self._pending.clear()

    def _time(self, action: Callable[[], _Result], on_ms: Callable[[float], None]) -> _Result:
        start, end = self._event(), self._event()
        start.record()
        result = action()
        end.record()
        self._pending.append((start, end, on_ms))
        return result

    def _event(self) -> Event:
        return self._free.pop() if self._free else self._new_event()


@runtime_checkable
class TimedBackend(Protocol):
    """A backend whose calls may only enqueue."""

    def timer(self) -> DeviceTimer | None:
        """Return a timer of its device; None where calls return when they are done."""


def timer_of(backend: Backend) -> DeviceTimer | None:
    """Return a timer of the backend's device; None where calls return when they are done."""
    return backend.timer() if isinstance(backend, TimedBackend) else None


def fastest_ms(backend: Backend, call: Call, *, n_runs: int = 3) -> float:
    """Return the milliseconds that the fastest of some runs took: by events where the backend's calls only enqueue."""
    timer = timer_of(backend)
    times_ms: list[float] = []
    for _ in range(n_runs):
        if timer is None:
            start = time.perf_counter()
            call()
            times_ms.append(1000 * (time.perf_counter() - start))
        else:
            timer.timed(call, times_ms.append)()
            timer.collect()
    return min(times_ms)

"""Ctrl-C while TensorRT works: a build ends at the library's next step, and the key is not lost in a call to Python."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_held() -> Iterator[list[int]]:
    """Hold a Ctrl-C back until what is inside has ended, and give it those that came.

    Python raises it in the next line that it runs, which is one of the log that the library calls; there pybind11
    prints "Exception caught in log()" and goes on, and the command would run to its end.
    """
    came: list[int] = []
    handle = signal.getsignal(signal.SIGINT)
    if not callable(handle) or threading.current_thread() is not threading.main_thread():  # others get no signals
        yield came
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, handle)
        if came:
            handle(came[0], None)


def cancelling(trt: Any, interrupts: list[int]) -> Any:
    """Return a progress monitor for a builder's config that cancels the build once there are interrupts.

    Engines may take long to build where the library times kernels. The caller keeps the monitor until the end.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of the module we were given
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # pybind11 wants it named

        def phase_start(self, phase: str, parent: str | None, n_steps: int) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return not interrupts

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()

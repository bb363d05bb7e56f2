"""Who may use a runtime now: one thread at a time, of a process that can."""

from __future__ import annotations

import os
import threading
import weakref

from bdtool.errors import EngineError

_ALL: weakref.WeakSet[Turns] = weakref.WeakSet()


class Turns:
    """The turns of threads at one runtime, and what is left of it in a process that forked.

    Args:
        needs_own_process: the runtime has threads, or a GPU, which stay behind where a process forks; a call on them
            would wait for ever.

    Attributes:
        lock: held by the thread whose turn it is, and again where its controller asks for P(keep). A process that
            forked has a new one, as whoever held it stayed behind.
        is_running: images run now.
    """

    def __init__(self, *, needs_own_process: bool) -> None:
        self._process = os.getpid() if needs_own_process else None
        self.renew()
        _ALL.add(self)

    def renew(self) -> None:
        """Forget whose turn it is."""
        self.lock = threading.RLock()
        self.is_running = False

    @property
    def are_inherited(self) -> bool:
        """Whether this process is a fork of the one that opened the runtime, and cannot use it."""
        return self._process is not None and self._process != os.getpid()

    def require_own_process(self) -> None:
        """Raise EngineError where the runtime is inherited."""
        if self.are_inherited:
            raise EngineError(
                "this orchestrator was opened before the process forked, and what its engines run on stayed behind. "
                "Open the bundle in each process after it forked, or with threads=1 on the CPU, but for strategy 'path'"
            )


def _renew_all() -> None:
    for turns in list(_ALL):
        turns.renew()


os.register_at_fork(after_in_child=_renew_all)

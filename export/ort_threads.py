"""ONNX Runtime's threads and memory, which belong to the process: our sessions are made from the options given here.

Sessions with their own thread pools fight for the cores: a ResNet-110's 54 block sessions with two threads each took
191 ms an image where one shared pool took 3 (`benchmarks/overheads.py`). ONNX Runtime's shared ("global") pool is made
once in a process and keeps its size, and from then on every session of the process must use it.
"""

from __future__ import annotations

import functools
import logging
import threading
from numbers import Integral

import onnxruntime as ort

from bdtool.errors import BackendError, UsageError
from export.processors import n_processors

MAX_DEFAULT_THREADS = 4  # a choice: the convolutions of small networks do not fill many cores
_MOST_THREADS, _MOST_THREADS_PER_CORE = 64, 8  # 64 on 2 processors answer within seconds, 1000 not within minutes
_ERRORS_ONLY = 3  # ONNX Runtime's log severity

logger = logging.getLogger(__name__)
_lock = threading.Lock()
_pool_threads: int | None = None  # size of the process's global pool, None where there is none


def default_threads() -> int:
    """Return the size of the process's pool, else the processors it may use, at most `MAX_DEFAULT_THREADS`."""
    return _pool_threads or max(1, min(int(n_processors()), MAX_DEFAULT_THREADS))


def checked_threads(threads: int | None) -> int:
    """Return a number of threads that was asked for, or the default where it is None.

    Raises:
        UsageError: it is no whole number from 1, or one that these processors cannot serve.
    """
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, Integral) or threads < 1:
        raise UsageError(f"threads: got {threads!r}, expected a whole number from 1, or None for the default")
    n_cores = n_processors()
    most = max(_MOST_THREADS, int(_MOST_THREADS_PER_CORE * n_cores))
    if threads > most:
        raise UsageError(
            f"threads: got {threads}, expected at most {most} on {n_cores:g} processors: more only wait for each "
            "other. The default is a good start"
        )
    _warn_of_more(int(threads), n_cores)
    return int(threads)


@functools.cache  # once, not for each backend that a command opens
def _warn_of_more(threads: int, n_cores: float) -> None:
    if threads > max(n_cores, 1):
        logger.warning("%d threads share %g processors and wait for each other; fewer are faster", threads, n_cores)


def any_threads_options() -> ort.SessionOptions:
    """Return options for a session whose speed does not matter: the global pool if there is one, else one thread."""
    return _options(shared=_pool_threads is not None)


def shared_threads_options(n_threads: int) -> ort.SessionOptions:
    """Return options for sessions that run on `n_threads` threads together, not each.

    One thread needs no pool: the caller's does the work.

    Raises:
        BackendError: the process already runs on another number of threads, or this onnxruntime has no shared pool.
    """
    with _lock:
        if n_threads > 1 and _pool_threads is None:
            _make_pool(n_threads)
        if _pool_threads is not None and _pool_threads != n_threads:
            raise BackendError(
                f"this process already runs ONNX Runtime on {_pool_threads} threads, "
                f"which cannot change to {n_threads}: use threads={_pool_threads}, or start another process"
            )
    return _options(shared=n_threads > 1)


def _make_pool(n_threads: int) -> None:
    global _pool_threads
    if not hasattr(ort, "set_global_thread_pool_sizes"):
        raise BackendError(
            f"onnxruntime {ort.__version__} cannot share {n_threads} threads between engines; "
            "use threads=1, or: pip install 'onnxruntime-gpu>=1.25'"
        )
    try:
        ort.set_global_thread_pool_sizes(n_threads, 1)
    except Exception as exc:  # onnxruntime's Fail
        raise BackendError(
            f"other code in this process has already set ONNX Runtime's global thread pool ({exc}); "
            "run bdtool in a process of its own"
        ) from exc
    _pool_threads = n_threads


@functools.cache
def _share_arena() -> None:
    """Make one CPU memory arena for all sessions: one each would hold on to the activations of its largest batch."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))


def _options(*, shared: bool) -> ort.SessionOptions:
    _share_arena()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = _ERRORS_ONLY
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if shared:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = options.inter_op_num_threads = 1
    return options

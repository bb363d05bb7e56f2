"""Two calls timed in turns: regimes of latency on a machine that others use then hit both alike."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

N_ROUNDS = 10
_N_CALLS = 10  # counted, of each in each round
_N_SETTLE = 3  # before them, as the other call has emptied the caches


def times_in_turns(first: Callable[[], None], second: Callable[[], None]) -> np.ndarray:
    """Return the median milliseconds of a call of each in each round, float64 [N_ROUNDS, 2].

    Which of them goes first changes with each round.
    """
    calls = (first, second)
    rounds = np.empty((N_ROUNDS, len(calls)))
    for i in range(N_ROUNDS):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            rounds[i, which] = _median_ms(calls[which])
    return rounds


def _median_ms(call: Callable[[], None]) -> float:
    seconds = []
    for _ in range(_N_SETTLE + _N_CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[_N_SETTLE:])) * 1e3

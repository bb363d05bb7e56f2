"""Calls beside each other in alternating rounds, so that what else the machine does meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


def rounds_of(calls: Sequence[Callable[[], object]], *, n_rounds: int, seconds: float) -> list[list[float]]:
    """Return for each round the seconds that one call of each took, after running it for so many seconds."""
    return [[_seconds_a_call(call, seconds) for call in calls] for _ in range(n_rounds)]


def _seconds_a_call(call: Callable[[], object], seconds: float) -> float:
    n_calls, start = 0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        call()
        n_calls += 1
    return (now - start) / n_calls

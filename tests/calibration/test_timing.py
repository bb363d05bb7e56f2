"""Two calls on a clock that the calls themselves move."""

from itertools import pairwise

import numpy as np
import pytest

from calibration import timing
from calibration.timing import N_ROUNDS, times_in_turns


@pytest.fixture
def call_of(monkeypatch):
    """Return a function that makes a call of so many ms, on a machine that others slow down threefold half-way."""
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)

    def make(ms):
        def call():
            nonlocal now
            now += ms / 1000 * (3 if now > 0.2 else 1)

        return call

    return make


def test_a_machine_that_slows_down_leaves_the_ratio_as_it_is(call_of):
    rounds = times_in_turns(call_of(1.0), call_of(0.8))
    assert rounds.shape == (N_ROUNDS, 2)
    assert rounds[:, 0].max() == pytest.approx(3 * rounds[:, 0].min())
    assert np.median(rounds[:, 1] / rounds[:, 0]) == pytest.approx(0.8)


def test_each_goes_first_in_turn():
    order = []
    times_in_turns(lambda: order.append("a"), lambda: order.append("b"))
    changes = [order[0], *(b for a, b in pairwise(order) if a != b)]
    assert order.count("a") == order.count("b")
    assert len(changes) == N_ROUNDS + 1  # that of one round ends with the call that the next one begins with


def test_times_are_in_milliseconds(monkeypatch):
    now_s = 0.0

    def taking(ms):
        def call():
            nonlocal now_s
            now_s += ms / 1000

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now_s)
    np.testing.assert_allclose(times_in_turns(taking(2), taking(3)), [[2, 3]] * N_ROUNDS)

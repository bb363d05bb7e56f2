"""Threads that share one orchestrator: their images run one call after the other, and get their own answers."""

import threading

import numpy as np
import pytest

from bdtool import Orchestrator

_N_THREADS, _N_CALLS, _BATCH = 4, 15, 6


@pytest.mark.parametrize("strategy", ["chain", "path", "fused", "full"])
def test_threads_that_share_a_runtime_get_their_own_answers(tiny, pixels, strategy):
    images = pixels(tiny.model, _N_THREADS * _BATCH).reshape(_N_THREADS, _BATCH, 32, 32, 3)
    with Orchestrator.open(tiny.bundle, strategy=strategy) as runtime:
        expected = [runtime.run(mine) for mine in images]
        wrong = []
        started = threading.Barrier(_N_THREADS)

        def work(number):
            started.wait()
            for _ in range(_N_CALLS):
                result = runtime.run(images[number])
                same = np.allclose(result.logits, expected[number].logits, atol=1e-5)
                if not (same and np.array_equal(result.policy, expected[number].policy)):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(_N_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len({result.logits.tobytes() for result in expected}) == _N_THREADS  # else a mix-up would not show


def test_closing_waits_for_what_runs_in_another_thread(fake, images_of):
    runtime = fake().runtime
    inside, go_on = threading.Event(), threading.Event()

    class Slow:
        mask = matrix = np.ones((1, 6), dtype=bool)

        def begin(self, n_images, probabilities):
            inside.set()
            assert go_on.wait(10)

        def keep(self, k):
            return True

        def observe(self, k, emitted):
            pass

    results = []
    runner = threading.Thread(target=lambda: results.append(runtime.run_with(images_of([1]), Slow())))
    runner.start()
    assert inside.wait(10)
    closer = threading.Thread(target=runtime.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    go_on.set()
    runner.join(10)
    closer.join(10)
    assert len(results) == 1
    with pytest.raises(ValueError, match="was closed"):
        runtime.run(images_of([1]))


@pytest.mark.parametrize(("call", "options"), [("decide", {}), ("run", {}), ("run", {"policy": "all"})])
def test_call_that_waits_while_another_thread_closes_says_closed(fake, images_of, call, options):
    runtime, errors = fake().runtime, []

    def ask():
        try:
            getattr(runtime, call)(images_of([1]), **options)
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    with runtime._turns.lock:  # so that it asks before, and runs after
        asking.start()
        asking.join(0.05)
        runtime.close()
    asking.join(10)
    [error] = errors
    assert isinstance(error, ValueError)
    assert "this orchestrator was closed" in str(error)

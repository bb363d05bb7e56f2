"""Strategies timed in alternating rounds of one run, so that drift and neighbours on the machine hit all alike.

A round runs some 50 images through one strategy, then the same images through the next. Changing the strategy for each
image would time cold caches; one long block for each would time the machine's drift. The first requests of a round
bring the caches back and are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bdtool.profiling.statistics import Samples
from bdtool.profiling.workload import Run, Settings, Workload, is_static, runner
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.specs import NetworkSpec

ROUND_IMAGES = 50
_SETTLE_REQUESTS = 3  # not counted at the start of each round
_MIN_ROUND_REQUESTS = 2  # of large batches: a median of one would be no median
_MIN_ROUNDS = 4


@dataclass(kw_only=True)
class Track:
    """One thing that takes turns: its requests, and what was measured so far."""

    run: Run
    requests: Sequence[tuple[np.ndarray, np.ndarray | None]]
    latency_ms: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    keep: list[np.ndarray] = field(default_factory=list)  # keep bits of each counted request
    hits: list[float] = field(default_factory=list)  # share of path hits of each counted request, where there are any
    spent_s: float = 0.0

    def samples(self, network: NetworkSpec, *, batch: int, with_policy: bool) -> Samples:
        flops = [network.flops_per_image(keep, with_policy=with_policy).mean() for keep in self.keep]
        return Samples(
            latency_ms=np.array(self.latency_ms),
            blocks_run=np.array([keep.sum(axis=1).mean() for keep in self.keep]),
            flops=np.array(flops),
            batch=batch,
            rounds=np.array(self.rounds),
            hits=np.array(self.hits) if self.hits else None,
        )


def measure(
    runtimes: Mapping[str, Orchestrator],
    workload: Workload,
    settings: Settings,
    *,
    on_round: Callable[[float], None] = lambda share_done: None,
) -> dict[str, Samples]:
    """Time every strategy on the same requests; one of them must be the baseline `full`.

    A strategy with given bits still runs the policy network where the bundle has one: its cost belongs to the answer.
    `full:<arch>` names the `full` engine of another bundle, for the same images.
    """
    requests = workload.requests(settings.batch)
    tracks = {name: Track(run=runner(name, runtime), requests=requests) for name, runtime in runtimes.items()}
    alternate(tracks, settings, on_round=on_round)
    return {name: samples_of(name, track, runtimes[name].network, settings.batch) for name, track in tracks.items()}


def samples_of(name: str, track: Track, network: NetworkSpec, batch: int) -> Samples:
    """Return what a track measured; FLOPs of a dynamic strategy hold the policy network, where there is one."""
    return track.samples(network, batch=batch, with_policy=not is_static(name) and network.has_policy)


def alternate(
    tracks: Mapping[str, Track],
    settings: Settings,
    *,
    round_images: int = ROUND_IMAGES,
    max_rounds: int | None = None,
    on_round: Callable[[float], None] = lambda share_done: None,
) -> None:
    """Run rounds in turns, swapping the order each time, until every track was measured for the duration.

    Args:
        max_rounds: stop after so many; None: never before the duration.
    """
    per_round = max(_MIN_ROUND_REQUESTS, round_images // settings.batch)
    for track in tracks.values():
        _warm_up(track, settings.warmup_ms, per_round)
    order, n_rounds = list(tracks), 0
    while n_rounds < _MIN_ROUNDS or min(track.spent_s for track in tracks.values()) < settings.duration_s:
        for name in order if n_rounds % 2 == 0 else reversed(order):
            _run_round(tracks[name], number=n_rounds, n_requests=per_round)
        n_rounds += 1
        if n_rounds == max_rounds:
            break
        slowest = min(track.spent_s for track in tracks.values())
        on_round(min(1.0, slowest / settings.duration_s, n_rounds / _MIN_ROUNDS))


def _warm_up(track: Track, warmup_ms: float, n_requests: int) -> None:
    """Run requests for that long, and at least those of a round once each: every engine and path is touched.

    Of large batches that is two: the others run uncounted at the start of their own rounds.
    """
    stop = time.perf_counter() + warmup_ms / 1000
    count = 0
    while time.perf_counter() < stop or count < min(len(track.requests), n_requests):
        track.run(*track.requests[count % len(track.requests)])
        count += 1


def _run_round(track: Track, *, number: int, n_requests: int) -> None:
    first, requests = number * n_requests, track.requests
    for i in range(min(_SETTLE_REQUESTS, n_requests)):
        track.run(*requests[(first + i) % len(requests)])
    for i in range(n_requests):
        images, keep = requests[(first + i) % len(requests)]
        start = time.perf_counter()
        result = track.run(images, keep)
        seconds = time.perf_counter() - start
        track.latency_ms.append(seconds * 1000)
        track.rounds.append(number)
        track.keep.append(result.policy)
        if result.hits is not None:
            track.hits.append(float(result.hits.mean()))
        track.spent_s += seconds

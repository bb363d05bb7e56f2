"""Strategies timed in alternating rounds of one run, so that drift and neighbours on the machine hit all alike.

A round runs some 50 images through one strategy, then the same images through the next; fewer where they take longer
than a round's share of the duration. Changing the strategy for each image would time cold caches; one long block for
each would time the machine's drift. The first requests of a round bring the caches back and are not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bdtool.profiling.statistics import Samples
from bdtool.profiling.workload import Run, Settings, Workload, is_static, runner
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.specs import NetworkSpec

ROUND_IMAGES = 50
LEAST_IMAGES = 5  # of a round, however long they take
_LEAST_ROUND_S = 0.02  # for each strategy, however short the duration: of a fast network that is many requests
_SETTLE_REQUESTS = 3  # not counted at the start of each round; one where a round is cut short
_MIN_ROUND_REQUESTS = 2  # of large batches: a median of one would be no median
_MIN_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How a run is cut into rounds."""

    images: int = ROUND_IMAGES  # of one round, at most
    least_images: int = LEAST_IMAGES
    number: int | None = None  # exactly so many; None: at least four, until the duration is over

    @property
    def least(self) -> int:
        """The fewest rounds there may be."""
        return _MIN_ROUNDS if self.number is None else self.number

    def n_requests(self, settings: Settings, request_s: float) -> tuple[int, int]:
        """Return the requests of a round that are counted, and how many are run before them.

        A round takes no longer than its share of the duration, or else holds the fewest images there may be.

        Args:
            request_s: what a request takes, mean over the tracks.
        """
        most = max(_MIN_ROUND_REQUESTS, self.images // settings.batch)
        round_s = max(_LEAST_ROUND_S, settings.duration_s / self.least)
        if most * request_s <= round_s:
            return most, min(_SETTLE_REQUESTS, most)
        least = max(_MIN_ROUND_REQUESTS, math.ceil(self.least_images / settings.batch))
        return max(least, int(round_s / request_s)), 1


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
    n_warm: int = 0  # requests of the warm-up
    quickest_s: float = math.inf  # of them

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
    rounds: Rounds = Rounds(),
    on_round: Callable[[float], None] = lambda share_done: None,
) -> None:
    """Run rounds in turns, swapping the order each time, until every track was measured for the duration.

    Where `rounds` gives a number of them, that many are run, whatever the duration.
    """
    for track in tracks.values():
        _warm_up(track, warmup_ms=settings.warmup_ms, n_requests=1)
    request_s = float(np.mean([track.quickest_s for track in tracks.values()]))
    n_requests, n_settling = rounds.n_requests(settings, request_s)
    if settings.warmup_ms > 0:
        for track in tracks.values():
            _warm_up(track, warmup_ms=0, n_requests=n_requests)
    order, n_rounds, share_done = list(tracks), 0, 0.0
    while share_done < 1:
        for name in order if n_rounds % 2 == 0 else reversed(order):
            _run_round(tracks[name], number=n_rounds, n_requests=n_requests, n_settling=n_settling)
        n_rounds += 1
        share_done = min(1.0, n_rounds / rounds.least)
        if rounds.number is None:
            share_done = min(share_done, *(track.spent_s / settings.duration_s for track in tracks.values()))
        on_round(share_done)


def _warm_up(track: Track, *, warmup_ms: float, n_requests: int) -> None:
    """Run requests for that long, and until `n_requests` of them, or all there are, were run once.

    With those of a round every engine and path that it takes is touched. Of large batches a round has two: the others
    run uncounted at the start of their own rounds.
    """
    now = time.perf_counter()
    stop = now + warmup_ms / 1000
    while now < stop or track.n_warm < min(len(track.requests), n_requests):
        start = now
        track.run(*track.requests[track.n_warm % len(track.requests)])
        now = time.perf_counter()
        track.quickest_s = min(track.quickest_s, now - start)
        track.n_warm += 1


def _run_round(track: Track, *, number: int, n_requests: int, n_settling: int) -> None:
    first, requests = number * n_requests, track.requests
    for i in range(n_settling):
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

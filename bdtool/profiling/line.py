"""Latency against blocks run: a fixed cost, a cost for each block, and the break-even point with `full`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from bdtool.profiling.measure import Rounds, Track, alternate, samples_of
from bdtool.profiling.statistics import Samples
from bdtool.profiling.workload import BASELINE, Settings, Workload, baseline_of, is_static, runner
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.policies import parse_policy

FROM_WORKLOAD = "the measured requests, whose images run different numbers of blocks"
FROM_POINTS = "extra points: the same images with distribute:{counts}, in alternating rounds of their own"
N_STEPS = 6
_ROUND_IMAGES = 20
_ROUNDS = 6  # of each point: a duration would be spent on the fastest of them
_FEWEST_ROUNDS = 2  # of large batches, and where six would take longer than the duration
_MIN_COUNTS = 3  # a line through two points always fits
_MIN_SPAN = 1 / 4  # of all blocks, between the fewest and the most
_MIN_SPAN_OF_MEANS = 1 / 3  # of batches: equal means hide different work, which is noise to the line
_MIN_REQUESTS = 3  # of a number of blocks, to have a median
_REQUESTS_OF_A_POINT = 10  # in the fewest rounds, or six points in a round: those that are not counted included


@dataclass(frozen=True, kw_only=True)
class BlocksLine:
    """latency of a request = fixed_ms + per_block_ms x blocks run (mean over its images), and where it meets `against`.

    `break_even_blocks` may lie beyond the blocks there are (always faster) or below 0 (never).
    """

    fixed_ms: float
    per_block_ms: float
    break_even_blocks: float | None  # None where another block costs nothing measurable
    r_squared: float | None  # of the medians that the line goes through; None where they are all equal
    n_counts: int  # different numbers of blocks
    n_requests: int
    points: str  # where they come from
    against: str = BASELINE  # the static network that `break_even_blocks` is about

    def latency_ms(self, blocks: float) -> float:
        return self.fixed_ms + self.per_block_ms * blocks


def fit_line(
    samples: Samples, full_ms: float, *, points: str = FROM_WORKLOAD, against: str = BASELINE, n_blocks: int = 0
) -> BlocksLine | None:
    """Fit a line by least squares through the median latency of each number of blocks run.

    Medians, weighted by how many requests they stand for: single slow requests must not tilt the line. Numbers of
    blocks with fewer than three requests are left out, and so are requests of `path` that missed: those are the
    chain's. None where fewer than three numbers of blocks are left, or where those span less than a quarter of
    `n_blocks`, of batches a third: such a line would be noise, drawn out to where it meets `full`.

    Args:
        full_ms: median of a request to the static network `against`.
        n_blocks: blocks there are; 0: any span will do.
    """
    hit = np.ones(len(samples.latency_ms), dtype=bool) if samples.hits is None else samples.hits == 1
    latency, blocks = samples.latency_ms[hit], samples.blocks_run[hit]
    counts, inverse, weights = np.unique(blocks, return_inverse=True, return_counts=True)
    medians = np.array([np.median(latency[inverse == i]) for i in range(len(counts))])
    enough = weights >= _MIN_REQUESTS
    counts, medians, weights = counts[enough], medians[enough], weights[enough]
    min_span = n_blocks * (_MIN_SPAN if samples.batch == 1 else _MIN_SPAN_OF_MEANS)
    if len(counts) < _MIN_COUNTS or np.ptp(counts) < min_span:
        return None
    per_block_ms, fixed_ms = (float(value) for value in np.polyfit(counts, medians, 1, w=np.sqrt(weights)))
    return BlocksLine(
        fixed_ms=fixed_ms,
        per_block_ms=per_block_ms,
        break_even_blocks=(full_ms - fixed_ms) / per_block_ms if per_block_ms > 0 else None,
        r_squared=_r_squared(medians, fixed_ms + per_block_ms * counts, weights),
        n_counts=len(counts),
        n_requests=int(weights.sum()),
        points=points,
        against=against,
    )


def fit_lines(
    runtimes: Mapping[str, Orchestrator],
    samples: Mapping[str, Samples],
    workload: Workload,
    settings: Settings,
    *,
    on_round: Callable[[float], None] = lambda share_done: None,
) -> dict[str, BlocksLine]:
    """Return the line of each strategy, from its samples or, where those run much the same blocks, from extra points.

    Args:
        runtimes: `full` and the strategies; static networks are not fitted, but compared with: a strategy with
            `full@<precision>` where that is there, else with `full`.
    """
    against = {name: baseline_of(name, runtimes) for name in runtimes if not is_static(name)}
    lines = {
        name: fit_line(samples[name], samples[full].median_ms, against=full, n_blocks=runtimes[name].network.n_blocks)
        for name, full in against.items()
    }
    missing = {name: against[name] for name, line in lines.items() if line is None}
    if missing:
        full_ms = max(samples[full].median_ms for full in missing.values())
        lines |= _lines_through_points(runtimes, missing, workload, settings, full_ms, on_round)
    return {name: line for name, line in lines.items() if line is not None}


def _lines_through_points(
    runtimes: Mapping[str, Orchestrator],
    against: Mapping[str, str],
    workload: Workload,
    settings: Settings,
    full_ms: float,
    on_round: Callable[[float], None],
) -> dict[str, BlocksLine | None]:
    """Measure a few numbers of blocks and static networks in alternating rounds; with the policy network, as elsewhere.

    Args:
        against: the strategies to fit, and the static network that each is compared with.
        full_ms: median of a request to the slowest of these networks so far.
    """
    network = runtimes[BASELINE].network
    n_steps, n_rounds = _n_steps_and_rounds(settings, full_ms)
    counts = sorted({round(step) for step in np.linspace(0, network.n_blocks, n_steps).tolist()})
    images = workload.images
    keeps = [
        parse_policy(f"distribute:{count}", n_blocks=network.n_blocks, has_policy_network=False).matrix(len(images))
        for count in counts
    ]
    text = FROM_POINTS.format(counts=",".join(map(str, counts)))
    short = replace(settings, warmup_ms=settings.warmup_ms / len(counts), duration_s=settings.duration_s / len(counts))
    rounds = Rounds(images=_ROUND_IMAGES, least_images=1, number=n_rounds)
    others = {name: _with_masks(runtimes[name], keeps) for name in against}
    try:
        static = {
            name: Track(run=runner(name, runtimes[name]), requests=workload.requests(settings.batch))
            for name in dict.fromkeys(against.values())
        }
        tracks = {
            f"{name} {count}": Track(
                run=runner(name, runtime), requests=Workload(images=images, keep=keep).requests(settings.batch)
            )
            for name, runtime in others.items()
            for count, keep in zip(counts, keeps, strict=True)
        }
        alternate({**static, **tracks}, short, rounds=rounds, on_round=on_round)
    finally:
        for runtime in others.values():
            runtime.close()
    return {
        name: fit_line(
            _joined([samples_of(name, tracks[f"{name} {count}"], network, settings.batch) for count in counts]),
            float(np.median(static[full].latency_ms)),  # of the same rounds as the points
            points=text,
            against=full,
        )
        for name, full in against.items()
    }


def _n_steps_and_rounds(settings: Settings, full_ms: float) -> tuple[int, int]:
    """Return how many numbers of blocks to measure, in how many rounds: the fewest where the duration holds no more."""
    point_s = _REQUESTS_OF_A_POINT * full_ms / 1000
    n_steps = N_STEPS if point_s <= settings.duration_s else _MIN_COUNTS
    is_quick = settings.batch <= _ROUND_IMAGES and _ROUNDS * point_s <= settings.duration_s
    return n_steps, _ROUNDS if is_quick else _FEWEST_ROUNDS


def _with_masks(runtime: Orchestrator, keeps: list[np.ndarray]) -> Orchestrator:
    """Return an orchestrator on the same engines; one of `path` has engines for these masks and joins no others."""
    return runtime.timed(
        lambda part, call: call, paths=PathOptions(ahead=[keep[0] for keep in keeps], background=False)
    )


def _joined(samples: list[Samples]) -> Samples:
    hits = [sample.hits for sample in samples if sample.hits is not None]
    return Samples(
        latency_ms=np.concatenate([sample.latency_ms for sample in samples]),
        blocks_run=np.concatenate([sample.blocks_run for sample in samples]),
        flops=np.concatenate([sample.flops for sample in samples]),
        batch=samples[0].batch,
        hits=np.concatenate(hits) if hits else None,
    )


def _r_squared(values: np.ndarray, fitted: np.ndarray, weights: np.ndarray) -> float | None:
    spread = float((weights * (values - np.average(values, weights=weights)) ** 2).sum())
    return None if spread == 0 else 1 - float((weights * (values - fitted) ** 2).sum()) / spread

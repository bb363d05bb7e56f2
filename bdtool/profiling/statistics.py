"""Latency samples in, the figures of a report out. Names and units follow trtexec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

UNSTABLE_ABOVE = 0.025  # trtexec warns above a coefficient of variation of 2.5 %
_ROUNDING = 1e-9  # 1 - 0.999 is a little less than 0.001
_MIN_QUARTILED = 4  # requests of equal work, to have quartiles
_SLOWEST_OF = 20  # requests, one of which any machine may hold up


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What one strategy was measured at: one row for each request of `batch` images."""

    latency_ms: np.ndarray  # float64 [requests]
    blocks_run: np.ndarray  # float64 [requests], mean over the request's images
    flops: np.ndarray  # float64 [requests], mean over the request's images
    batch: int
    rounds: np.ndarray | None = None  # int [requests], the round that each ran in; None where there were none
    hits: np.ndarray | None = None  # float64 [requests], share of images that ran as one path engine

    @property
    def median_ms(self) -> float:
        return float(np.median(self.latency_ms))

    @property
    def hit_rate(self) -> float | None:
        """Share of the measured images that ran as one path engine; None for strategies without them."""
        return None if self.hits is None else float(self.hits.mean())

    def summary(self, percentiles: Sequence[float]) -> dict[str, float | None]:
        """Return min, mean, median, the percentiles (as "p99") and max, in milliseconds.

        A percentile is None where too few requests were measured for one of them to lie beyond it: p99 takes 100.
        """
        latency = self.latency_ms
        return {
            "min": float(latency.min()),
            "mean": float(latency.mean()),
            "median": self.median_ms,
            **{f"p{p:.15g}": _percentile(latency, p) for p in percentiles},
            "max": float(latency.max()),
        }

    @property
    def throughput_ips(self) -> float:
        """Images per second when requests follow each other."""
        return float(self.batch * 1000 / self.latency_ms.mean())

    @property
    def variation(self) -> float:
        """Coefficient of variation of the latency of equal work: standard deviation over mean.

        An image that keeps more blocks rightly takes longer, so the deviation is pooled over groups of requests that
        ran equally many blocks. Where all requests run the same blocks this is trtexec's figure.
        """
        return _pooled_variation(self._equal_work(), self.latency_ms.mean())

    @property
    def typical_ms(self) -> float:
        """Mean over requests of the median latency of those that ran equally many blocks.

        That is the mean without what slows some requests of equal work, or speeds them up.
        """
        return self._mean_of_groups(np.median)

    @property
    def trimmed_mean_ms(self) -> float:
        """Mean over requests of the mean latency of those that ran equally many blocks, without the slowest 5 %."""
        return self._mean_of_groups(_without_slowest)

    @property
    def spread(self) -> float:
        """Distance of the quartiles of the latency of equal work, as a share of its median; NaN of few requests."""
        groups = [group for group in self._equal_work() if len(group) >= _MIN_QUARTILED]
        if not groups:
            return float("nan")
        apart = sum(len(group) * np.subtract(*np.percentile(group, (75, 25))) for group in groups)
        return float(apart / sum(len(group) * np.median(group) for group in groups))

    def median_ms_iqr(self) -> list[float] | None:
        """Return the lower and upper quartile of the rounds' medians, in milliseconds."""
        medians = self._of_rounds(np.median)
        return None if medians is None else _quartiles(medians)

    def ratio_to(self, full: Samples) -> float:
        """Return the median over rounds of this mean latency over that of `full` in the same round.

        Means within a round: on a busy machine latency has two regimes, and as a request to `full` is longer, more
        than half of them may fall into the slow one while less than half of these do, so that a ratio of medians is
        one of different regimes. A mixture of paths costs its mean, too. The median over rounds, because what
        disturbs the machine for longer than a round slows both alike, and for shorter a few rounds only. Without
        rounds it is the ratio of means.
        """
        ratios = self._round_ratios(full)
        return float(self.latency_ms.mean() / full.latency_ms.mean() if ratios is None else np.median(ratios))

    def ratio_iqr(self, full: Samples) -> list[float] | None:
        """Return the lower and upper quartile of what `ratio_to` is the median of."""
        ratios = self._round_ratios(full)
        return None if ratios is None else _quartiles(ratios)

    def _equal_work(self) -> list[np.ndarray]:
        """Return the latencies in groups that ran equally many blocks, in one path engine or not."""
        return _groups(self.latency_ms, self.blocks_run, self.hits)

    def _mean_of_groups(self, figure: Callable[[np.ndarray], Any]) -> float:
        return float(sum(len(group) * figure(group) for group in self._equal_work()) / len(self.latency_ms))

    def _of_rounds(self, figure: Callable[[np.ndarray], Any]) -> np.ndarray | None:
        """Return a figure of each round's latencies, float64 [rounds]; None where there were no rounds."""
        if self.rounds is None:
            return None
        return np.array([figure(self.latency_ms[self.rounds == n]) for n in np.unique(self.rounds)])

    def _round_ratios(self, full: Samples) -> np.ndarray | None:
        mine, base = self._of_rounds(np.mean), full._of_rounds(np.mean)
        return None if mine is None or base is None or len(mine) != len(base) else mine / base

    def to_json(self, full: Samples, percentiles: Sequence[float]) -> dict[str, Any]:
        return {
            "latency_ms": self.summary(percentiles),
            "median_ms_iqr": self.median_ms_iqr(),
            "throughput_ips": self.throughput_ips,
            "ratio_to_full": self.ratio_to(full),
            "ratio_to_full_iqr": self.ratio_iqr(full),
            "flops_ratio_to_full": float(self.flops.mean() / full.flops.mean()),
            "blocks_mean": float(self.blocks_run.mean()),
            "coefficient_of_variation": None if np.isnan(self.variation) else self.variation,
            "n_requests": len(self.latency_ms),
        }


def pooled_variation(times_ms: np.ndarray, blocks_run: np.ndarray) -> float:
    """Return the coefficient of variation of times float [requests] within groups that ran equally many blocks.

    NaN where no two requests did, or all times are zero.
    """
    return _pooled_variation(_groups(times_ms, blocks_run), times_ms.mean())


def _pooled_variation(groups: Sequence[np.ndarray], mean: float) -> float:
    several = [group for group in groups if len(group) > 1]
    if not several or mean == 0:
        return float("nan")
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in several)
    freedom = sum(len(group) - 1 for group in several)
    return float(np.sqrt(squares / freedom) / mean)


def _groups(times_ms: np.ndarray, *alike: np.ndarray | None) -> list[np.ndarray]:
    """Return the times float [requests] in groups whose figures, float [requests] each, are alike."""
    known = [figures for figures in alike if figures is not None]
    _, group_of = np.unique(np.stack(known, axis=1), axis=0, return_inverse=True)
    return [times_ms[group_of.ravel() == n] for n in range(group_of.max() + 1)]


def _without_slowest(values: np.ndarray) -> float:
    """Return the mean of all but the slowest of each 20."""
    return float(np.sort(values)[: len(values) - len(values) // _SLOWEST_OF].mean())


def _percentile(values: np.ndarray, percentile: float) -> float | None:
    """Return a percentile, or None where it would be interpolated between the outermost value and the next."""
    beyond = min(percentile, 100 - percentile) / 100  # the share of values on its outer side; 0: the extreme itself
    if beyond > 0 and len(values) * beyond < 1 - _ROUNDING:
        return None
    return float(np.percentile(values, percentile))


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(np.percentile(values, p)) for p in (25, 75)]

"""Whether a run's figures can be trusted: how far requests of equal work lie apart, and estimates of a ratio.

The bounds are choices, far above the spread of a machine that runs nothing else. Single slow requests, which every
machine has, move neither: the mean is that of all but the slowest of 20.
"""

from __future__ import annotations

from collections.abc import Mapping

from bdtool.profiling.statistics import UNSTABLE_ABOVE, Samples
from bdtool.profiling.workload import BASELINE

SPREAD_ABOVE = 0.5  # distance of the quartiles, of the median: latency has more than one regime
RATIOS_APART_ABOVE = 0.15  # of the smaller one: regimes fall differently on the strategy and on `full`


def find_instability(samples: Mapping[str, Samples]) -> list[str]:
    """Return why ratios to `full` are not to be trusted, a reason for each strategy that has one; [] where they are."""
    full = samples[BASELINE]
    reasons = {name: _ratios_apart(one, full) or _spread(one) for name, one in samples.items()}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def stability_warnings(samples: Mapping[str, Samples]) -> list[str]:
    """Return one warning at most: that ratios are not to be trusted, or else trtexec's, that latency varies.

    trtexec's names the strategies whose coefficient of variation among requests of equal work is above its bound.
    """
    if reasons := find_instability(samples):
        return [
            f"UNSTABLE, ratios to `full` are not to be trusted: {'; '.join(reasons)}. The machine is busy or its clock "
            "changes; measure again when nothing else runs"
        ]
    shaky = [f"{name} {one.variation:.1%}" for name, one in samples.items() if one.variation > UNSTABLE_ABOVE]
    if not shaky:
        return []
    return [
        f"coefficient of variation above {UNSTABLE_ABOVE:.1%}: {', '.join(shaky)}; the machine is busy or its clock "
        "changes. Compare medians and ratios of one run only"
    ]


def _spread(one: Samples) -> str | None:
    if not one.spread > SPREAD_ABOVE:  # NaN, too
        return None
    return f"quartiles of equal work lie {one.spread:.0%} of the median apart"


def _ratios_apart(one: Samples, full: Samples) -> str | None:
    of_means, of_medians = one.trimmed_mean_ms / full.trimmed_mean_ms, one.typical_ms / full.typical_ms
    if max(of_means, of_medians) <= (1 + RATIOS_APART_ABOVE) * min(of_means, of_medians):
        return None
    return f"{of_means:.3f} of `full` by means without the slowest 5 %, {of_medians:.3f} by medians of equal work"

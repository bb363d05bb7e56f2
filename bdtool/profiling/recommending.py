"""What strategy `auto` will take: chosen from a profile's samples, recorded where the figures bear it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bdtool.profiling.statistics import Samples
from bdtool.profiling.workload import BASELINE
from bdtool.runtime.read_only import is_read_only, tell_not_kept
from bdtool.runtime.recommendation import (
    CANDIDATES,
    Recommendation,
    choose_strategy,
    is_recommended,
    write_recommendation,
)

_VERSIONS = ("bdtool", "backend", "numpy", "python", "cpu")


def recommend(
    samples: Mapping[str, Samples],
    *,
    batch: int,
    policy: str,
    input_source: str,
    environment: Mapping[str, str | int | float],
) -> Recommendation:
    """Return the strategy with the lowest ratio to `full`, by means of rounds: medians mislead on a busy machine."""
    ratios = {name: one.ratio_to(samples[BASELINE]) for name, one in samples.items()}
    return Recommendation(
        strategy=choose_strategy(ratios),
        threads=int(environment["threads"]),
        batch=batch,
        policy=policy,
        medians_ms={name: one.median_ms for name, one in samples.items()},
        ratios_to_full=ratios,
        input_source=input_source,
        versions={key: str(environment[key]) for key in _VERSIONS},
    )


def record(recommendation: Recommendation, directory: Path, *, bundle: Path, is_stable: bool) -> tuple[bool, list[str]]:
    """Record a recommendation in the engines' directory; return whether that was done, and warnings.

    An unstable run leaves an earlier record as it is. Without one its own is recorded, and a warning says so: a machine
    that is always busy could not use `auto` otherwise, and a strategy that is some percent slower still answers.
    """
    warnings = []
    ratios = recommendation.ratios_to_full
    if ratios[recommendation.strategy] > 1:
        measured = ", ".join(name for name in ratios if name in CANDIDATES)
        warnings.append(f"none of {measured} is faster than `full` here; `auto` takes the fastest of them")
    if is_read_only(bundle):
        tell_not_kept(bundle, "the recommendation that strategy `auto` takes")
        return False, warnings
    if not is_stable:
        if is_recommended(directory, threads=recommendation.threads, batch=recommendation.batch):
            return False, [*warnings, "the run is unstable: strategy 'auto' keeps the recommendation of an earlier one"]
        warnings.append(
            "the recommendation is from an unstable run, recorded because there was none. Profile again with "
            "--strategy auto when nothing else runs, or name a strategy"
        )
    try:
        write_recommendation(directory, recommendation)
    except OSError as exc:
        reason = exc.strerror or exc
        return False, [
            *warnings,
            f"the recommendation could not be recorded ({reason}); strategy 'auto' does not know it",
        ]
    return True, warnings

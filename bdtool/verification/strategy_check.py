"""What the strategies beside `chain` and `full` answer, on a few images: each joins or fuses engines in its own way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bdtool.runtime.factory import ONE_BY_ONE, strategies_for
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.place import Place
from bdtool.runtime.result import RunResult, joined
from export.bundle import Bundle

LEARNED = "learned"
_OTHERS = ("path", "fused", "graph")


def other_strategies(place: Place, chain: Orchestrator) -> tuple[str, ...]:
    """Return the strategies beside `chain` and `full` that the backend has there, for engines as those of `chain`."""
    others = [name for name in strategies_for(place.backend, place.device) if name in _OTHERS]
    return tuple(name for name in others if chain.min_batch == 1 or name not in ONE_BY_ONE)


def answers_of(
    bundle: Bundle, strategy: str, place: Place, images: np.ndarray, policies: Mapping[str, np.ndarray]
) -> dict[str, RunResult]:
    """Return what a strategy answers to each policy, image by image; under `learned` it decides by itself.

    Args:
        images: uint8 [n, height, width, 3].
        policies: keep matrices bool [n, K] by name; their masks have engines from the start, where they fit the cache.

    Raises:
        EngineError: engines cannot be joined, or do not run.
    """
    masks = np.unique(np.concatenate(list(policies.values())), axis=0)
    with place.open(bundle, strategy, paths=PathOptions(ahead=list(masks), background=False)) as runtime:
        return {
            name: run_in_slices(runtime, images, None if name == LEARNED else keep, size=1)
            for name, keep in policies.items()
        }


def run_in_slices(runtime: Orchestrator, images: np.ndarray, keep: np.ndarray | None, *, size: int) -> RunResult:
    """Run so many images at a time, with keep bits [N, K], or None: it decides by itself."""
    rows = [slice(start, start + size) for start in range(0, len(images), size)]
    return joined([runtime.run(images[row], policy=None if keep is None else keep[row]) for row in rows])

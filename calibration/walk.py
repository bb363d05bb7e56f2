"""Images along the paths they really take: each part sees what the earlier blocks, kept or not, left of an image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bdtool.specs import NetworkSpec, PartSpec

RunPart = Callable[[PartSpec, np.ndarray], np.ndarray]


def runs_part(part: PartSpec, keep: np.ndarray) -> np.ndarray:
    """Return which images run a part, bool [N], for keep bits [N, K]; stem, head and policy network run for all."""
    if part.index is None:
        return np.ones(len(keep), dtype=bool)
    runs: np.ndarray = keep[:, part.index] == (part.kind == "block")
    return runs


def everyone_where_nobody(keep: np.ndarray) -> Callable[[PartSpec], np.ndarray]:
    """Return what lets all images run a part besides (`extra` of `walk_paths`) where none of them keeps it."""
    return lambda part: np.arange(0 if runs_part(part, keep).any() else len(keep))


def walk_paths(
    network: NetworkSpec,
    images: np.ndarray,
    keep: np.ndarray,
    run: RunPart,
    *,
    extra: Callable[[PartSpec], np.ndarray] = lambda part: np.array([], dtype=np.int64),
) -> np.ndarray:
    """Run images along their paths and return what the head gives.

    Args:
        images: float32 [N, ...].
        keep: bool [N, K].
        run: called once with each part that images run, in running order, and with the rows that it is to run; returns
            as many rows.
        extra: rows, int [n], that a part runs besides, for what `run` finds out there; what it returns for them is
            dropped, each image goes on along its own path.
    """

    def step(part: PartSpec, values: np.ndarray) -> np.ndarray:
        own = np.flatnonzero(runs_part(part, keep))
        rows = np.concatenate([own, extra(part)])
        return run(part, values[rows])[: len(own)] if len(rows) else values[:0]

    policy = network.find("policy")
    if policy is not None:
        step(policy, images)
    x = step(network.require("stem"), images)
    for k, block in enumerate(network.blocks):
        shortcut = network.shortcut(k)
        kept = step(block, x)
        dropped = x[~keep[:, k]] if shortcut is None else step(shortcut, x)
        x = _scattered(keep[:, k], kept, dropped)
    return step(network.require("head"), x)


def _scattered(keep: np.ndarray, kept: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    if not len(dropped) or not len(kept):
        return kept if len(kept) else dropped
    result = np.empty((len(keep), *kept.shape[1:]), dtype=kept.dtype)
    result[keep], result[~keep] = kept, dropped
    return result

"""What the kernels of `engines.dispatch_kernel` work out, in Python: to test them against, and to do in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.dispatch import MAX_BLOCKS, NOT_FINITE, mask_table, runs
from export.fused_spec import FORCE_KEEP


@dataclass(frozen=True)
class Dispatch:
    """What one image's policy comes to: `switches` holds a value, of `body_runs`, for each group of blocks."""

    kept: tuple[int, ...]  # 0, 1, or NOT_FINITE
    switches: tuple[int, ...]


def dispatch(
    probabilities: Sequence[float],
    has_shortcut: Sequence[bool],
    *,
    threshold: float,
    force: Sequence[int] | None = None,
    blocks_per_switch: int = 1,
) -> Dispatch:
    """Return which bodies run; the activation starts in buffer A.

    Args:
        probabilities: P(keep) of each block, [K].
        has_shortcut: where dropping a block runs its shortcut part, [K].
        force: 0 (the policy decides), FORCE_KEEP or FORCE_DROP for each block; None leaves all to the policy.
        blocks_per_switch: how many neighbouring blocks share a SWITCH; the last one may have fewer.

    Raises:
        ValueError: more than `MAX_BLOCKS` blocks, or lengths that differ.
    """
    _check_lengths(probabilities, has_shortcut, force)
    n_blocks = len(has_shortcut)
    side, kept, switches = 0, _kept(probabilities, threshold, force), []
    for first in range(0, n_blocks, blocks_per_switch):
        keep = [bit == 1 for bit in kept[first : first + blocks_per_switch]]
        switches.append(2 * sum(bit << i for i, bit in enumerate(keep)) + side)
        _, side = runs(keep, has_shortcut[first : first + blocks_per_switch], side=side)
    return Dispatch(kept, tuple(switches))


@dataclass(frozen=True)
class Lookup:
    """What one image's policy comes to: `path` is the row of its mask in the table, or the number of rows."""

    kept: tuple[int, ...]  # as in `Dispatch`
    path: int


def lookup(
    probabilities: Sequence[float],
    table: Sequence[tuple[int, int]],
    *,
    threshold: float,
    force: Sequence[int] | None = None,
) -> Lookup:
    """Return which path runs: that of the image's mask in a `mask_table`, by bisection as on the device.

    Raises:
        ValueError: more than `MAX_BLOCKS` blocks, or lengths that differ.
    """
    n_blocks = len(probabilities)
    if n_blocks > MAX_BLOCKS or (force is not None and len(force) != n_blocks):
        raise ValueError(f"{n_blocks} probabilities; expected as many overrides, and at most {MAX_BLOCKS}")
    kept = _kept(probabilities, threshold, force)
    [mask] = mask_table([[bit == 1 for bit in kept]])
    first, end = 0, len(table)
    while first < end:
        middle = (first + end) // 2
        first, end = (middle + 1, end) if tuple(table[middle]) < mask else (first, middle)
    found = first < len(table) and tuple(table[first]) == mask
    return Lookup(kept, first if found else len(table))


def _check_lengths(probabilities: Sequence[float], has_shortcut: Sequence[bool], force: Sequence[int] | None) -> None:
    n_blocks = len(has_shortcut)
    if n_blocks > MAX_BLOCKS or len(probabilities) != n_blocks or (force is not None and len(force) != n_blocks):
        raise ValueError(
            f"{len(probabilities)} probabilities for {n_blocks} blocks; expected as many, and at most {MAX_BLOCKS}"
        )


def _kept(probabilities: Sequence[float], threshold: float, force: Sequence[int] | None) -> tuple[int, ...]:
    """Return 0, 1, or NOT_FINITE, which drops, for each block."""
    kept = []
    for k, probability in enumerate(probabilities):
        forced = 0 if force is None else force[k]
        if forced:
            kept.append(int(forced == FORCE_KEEP))
        else:
            kept.append(NOT_FINITE if probability != probability else int(probability >= threshold))
    return tuple(kept)

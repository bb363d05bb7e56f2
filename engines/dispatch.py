"""How a policy becomes branches of a CUDA graph: the arithmetic of `engines.dispatch_kernel`, in Python.

A graph holds one SWITCH for every few neighbouring blocks, with a body for each of their keep bits and for either of
the two buffers that the activation may be in by then. A graph that knows the frequent keep masks looks the image's mask
up first: one SWITCH over their paths, and what was said above as its last body. For drivers that have no SWITCH there
is an IF for each part. On the device one thread works that out; here is the same, to test against and to lay out the
bodies by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_BLOCKS = 128  # handles that the kernel takes by value: 1 KiB of its parameters
FROM_POLICY, FORCE_KEEP, FORCE_DROP = 0, 1, 2  # as `export.fused_spec` has them
NOT_FINITE = 2  # in the place of a keep bit: the policy gave NaN, which compares as drop

_WORD_BITS = 64


class Run(NamedTuple):
    """A part that runs, a block's own or its shortcut, from buffer `side` (0: A, 1: B) to the other."""

    block: int
    is_kept: bool
    side: int


def runs(keep: Sequence[bool], has_shortcut: Sequence[bool], *, side: int = 0) -> tuple[list[Run], int]:
    """Return what blocks [n] run whose activation is in buffer `side`, in order, and the buffer that it is in then."""
    found: list[Run] = []
    for k, (is_kept, shortcut) in enumerate(zip(keep, has_shortcut, strict=True)):
        if is_kept or shortcut:
            found.append(Run(k, is_kept, side))
            side ^= 1
    return found, side


def body_runs(value: int, has_shortcut: Sequence[bool]) -> tuple[list[Run], int]:
    """Return what the body runs that a SWITCH over these blocks [n] takes at `value`: `runs` of its bits and side."""
    bits, side = divmod(value, 2)
    return runs([bool(bits >> i & 1) for i in range(len(has_shortcut))], has_shortcut, side=side)


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
        force: FROM_POLICY, FORCE_KEEP or FORCE_DROP for each block; None leaves all to the policy.
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
class Branches:
    """What one image's policy comes to: which of the blocks' IFs run, and which of their shortcut parts'."""

    kept: tuple[int, ...]  # as in `Dispatch`
    keeps: tuple[int, ...]  # 0 or 1
    drops: tuple[int | None, ...]  # None where a block has no shortcut part


def branches(
    probabilities: Sequence[float],
    has_shortcut: Sequence[bool],
    *,
    threshold: float,
    force: Sequence[int] | None = None,
) -> Branches:
    """Return which parts run; arguments and errors as for `dispatch`."""
    _check_lengths(probabilities, has_shortcut, force)
    kept = _kept(probabilities, threshold, force)
    keeps = tuple(int(bit == 1) for bit in kept)
    drops = tuple(1 - keep if shortcut else None for keep, shortcut in zip(keeps, has_shortcut, strict=True))
    return Branches(kept, keeps, drops)


@dataclass(frozen=True)
class Lookup:
    """What one image's policy comes to: `path` is the row of its mask in the table, or the number of rows."""

    kept: tuple[int, ...]  # as in `Dispatch`
    path: int


def mask_table(masks: Sequence[Sequence[bool]]) -> tuple[tuple[int, int], ...]:
    """Return different keep masks [K] as rows of two 64-bit words, block 0 in the lowest bit, in ascending order."""
    return tuple(sorted({_words([int(bit) for bit in mask]) for mask in masks}))


def bits_from_words(words: tuple[int, int], n_blocks: int) -> list[bool]:
    """Return the keep bits [K] of a row of `mask_table`."""
    return [bool(words[k // _WORD_BITS] >> k % _WORD_BITS & 1) for k in range(n_blocks)]


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
    mask = _words(kept)
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
        forced = FROM_POLICY if force is None else force[k]
        if forced != FROM_POLICY:
            kept.append(int(forced == FORCE_KEEP))
        else:
            kept.append(NOT_FINITE if probability != probability else int(probability >= threshold))
    return tuple(kept)


def _words(kept: Sequence[int]) -> tuple[int, int]:
    words = [0, 0]
    for k, keep in enumerate(kept):
        words[k // _WORD_BITS] |= (keep == 1) << k % _WORD_BITS
    return words[0], words[1]

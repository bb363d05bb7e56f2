"""How a policy becomes branches of a CUDA graph: which parts its bodies run, and which masks it knows.

A graph holds one SWITCH for every few neighbouring blocks, with a body for each of their keep bits and for either of
the two buffers that the activation may be in by then. A graph that knows the frequent keep masks looks the image's mask
up first: one SWITCH over their paths, and what was said above as its last body. On the device one thread works out
which bodies run: `engines.dispatch_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_BLOCKS = 128  # handles that the kernel takes by value: 1 KiB of its parameters
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


def mask_table(masks: Sequence[Sequence[bool]]) -> tuple[tuple[int, int], ...]:
    """Return different keep masks [K] as rows of two 64-bit words, block 0 in the lowest bit, in ascending order."""
    return tuple(sorted({_words(mask) for mask in masks}))


def bits_from_words(words: tuple[int, int], n_blocks: int) -> list[bool]:
    """Return the keep bits [K] of a row of `mask_table`."""
    return [bool(words[k // _WORD_BITS] >> k % _WORD_BITS & 1) for k in range(n_blocks)]


def _words(mask: Sequence[bool]) -> tuple[int, int]:
    words = [0, 0]
    for k, is_kept in enumerate(mask):
        words[k // _WORD_BITS] |= int(is_kept) << k % _WORD_BITS
    return words[0], words[1]

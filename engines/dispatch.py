"""How a policy becomes branches of a CUDA graph: the arithmetic of `engines.dispatch_kernel`, in Python.

A graph holds one SWITCH for each block, whose bodies are the block's captured work for both directions between the two
activation buffers. Which body runs depends on the keep bit and on where the activation is by then. On the device one
thread works that out; here is the same, to test against and to lay out the bodies by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_BLOCKS = 128  # handles that the kernel takes by value: 1 KiB of its parameters
FROM_POLICY, FORCE_KEEP, FORCE_DROP = 0, 1, 2  # as `export.fused` has them
NOT_FINITE = 2  # in the place of a keep bit: the policy gave NaN, which compares as drop

# Bodies of a block's SWITCH, by the value its handle is set to. Without a shortcut part there are only the first three.
SKIP, BLOCK_AB, BLOCK_BA, SHORTCUT_AB, SHORTCUT_BA = range(5)


@dataclass(frozen=True)
class Dispatch:
    """What one image's policy comes to: `switches` holds a value for each block, `head` 0 for buffer A and 1 for B."""

    kept: tuple[int, ...]  # 0, 1, or NOT_FINITE
    switches: tuple[int, ...]
    head: int


def dispatch(
    probabilities: Sequence[float],
    has_shortcut: Sequence[bool],
    *,
    threshold: float,
    force: Sequence[int] | None = None,
) -> Dispatch:
    """Return which bodies run; the activation starts in buffer A.

    Args:
        probabilities: P(keep) of each block, [K].
        has_shortcut: where dropping a block runs its shortcut part, [K].
        force: FROM_POLICY, FORCE_KEEP or FORCE_DROP for each block; None leaves all to the policy.

    Raises:
        ValueError: more than `MAX_BLOCKS` blocks, or lengths that differ.
    """
    n_blocks = len(has_shortcut)
    if n_blocks > MAX_BLOCKS or len(probabilities) != n_blocks or (force is not None and len(force) != n_blocks):
        raise ValueError(
            f"{len(probabilities)} probabilities for {n_blocks} blocks; expected as many, and at most {MAX_BLOCKS}"
        )
    side, kept, switches = 0, [], []
    for k, probability in enumerate(probabilities):
        keep = probability >= threshold
        forced = FROM_POLICY if force is None else force[k]
        if forced != FROM_POLICY:
            keep = forced == FORCE_KEEP
        value = BLOCK_AB + side if keep else SHORTCUT_AB + side if has_shortcut[k] else SKIP
        if value != SKIP:
            side ^= 1
        kept.append(NOT_FINITE if forced == FROM_POLICY and probability != probability else int(keep))
        switches.append(value)
    return Dispatch(tuple(kept), tuple(switches), side)

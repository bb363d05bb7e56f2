"""Which precision for which block: the cheapest choice that keeps the accuracy, found greedily."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEAST_SAVING = 0.02  # share of a block's time: what saves less is not worth its error


@dataclass(frozen=True, kw_only=True)
class BlockSensitivity:
    """What one block alone in a lower precision does to the network, and what it saves."""

    block: str
    precision: str
    accuracy_drop: float  # percentage points, against fp32 on the same keep bits; negative where it gains
    changed_classes: float  # share of images, 0 to 1
    policy_flips: float | None  # share of keep bits decided otherwise; None without a policy network
    logits_error: float  # root mean square of the difference over that of the fp32 logits
    fp32_ms: float  # of one engine call at batch 1: median over rounds
    ratio_to_fp32: float  # of times of one round: median over rounds
    ratio_to_fp32_iqr: Sequence[float]  # its quartiles: lower, upper

    @property
    def ms(self) -> float:
        """Milliseconds of a call, as its ratio says: medians of their own may be of other stretches of time."""
        return self.ratio_to_fp32 * self.fp32_ms

    @property
    def saved_ms(self) -> float:
        return self.fp32_ms - self.ms

    @property
    def is_faster(self) -> bool:
        """Say whether it is faster by `LEAST_SAVING`, and measurably: the quartiles do not lie on both sides of 1."""
        return self.ratio_to_fp32 <= 1 - LEAST_SAVING and max(self.ratio_to_fp32_iqr) < 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ms": self.ms, "saved_ms": self.saved_ms, "is_faster": self.is_faster}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The precisions chosen, and each step that led there."""

    precisions: Mapping[str, str]  # by block; what is not listed stays fp32
    not_faster: tuple[str, ...]  # blocks that are not measurably faster in any lower precision, or not worth it
    accuracy_drop: float  # percentage points, measured with all of them together
    steps: tuple[Mapping[str, Any], ...]


def choose_precisions(
    rows: Sequence[BlockSensitivity], drop_of: Callable[[Mapping[str, str]], float], *, max_accuracy_drop: float
) -> Choice:
    """Start with the fastest precision of each block; give back fp32 where it costs most until the bound is kept.

    A block that is not measurably faster in any lower precision, by `LEAST_SAVING`, stays fp32 from the start. The
    block to give back next is the one with the largest logits error for each millisecond that it saves: errors of
    single blocks add up in the logits, while the accuracy moves in steps of one image. Each step is measured with all
    chosen precisions together.

    Args:
        rows: one for each block and lower precision.
        drop_of: measures the accuracy drop in percentage points for precisions by block.
        max_accuracy_drop: the bound, in percentage points.
    """
    fastest: dict[str, BlockSensitivity] = {}
    for row in rows:
        best = fastest.get(row.block)
        if row.is_faster and (best is None or row.saved_ms > best.saved_ms):
            fastest[row.block] = row
    give_back = sorted(fastest.values(), key=lambda row: (row.logits_error / row.saved_ms, row.block))
    chosen = {row.block: row.precision for row in fastest.values()}
    not_faster = tuple(dict.fromkeys(row.block for row in rows if row.block not in fastest))
    steps: list[dict[str, Any]] = []
    while True:
        drop = drop_of(chosen) if chosen else 0.0
        steps.append({"n_lower": len(chosen), "accuracy_drop": drop})
        if drop <= max_accuracy_drop or not chosen:
            return Choice(precisions=dict(chosen), not_faster=not_faster, accuracy_drop=drop, steps=tuple(steps))
        row = give_back.pop()
        del chosen[row.block]
        steps[-1]["given_back"] = row.block

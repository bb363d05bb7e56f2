"""Blocks that only some images of a batch keep: those images are the *rows* of its buffers that run.

Either the rows are gathered into scratch memory, run there and scattered back, or everyone runs and the others get
their rows back, whichever is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bdtool.runtime.binding import Binder
from bdtool.runtime.controllers import Controller
from bdtool.runtime.padding import padded
from bdtool.specs import PartSpec, TensorSpec
from engines.base import Buffer, Call
from engines.device_timer import fastest_ms

MAX_ROW_CALLS = 4096  # bindings of parts to some rows of a batch that are kept; each takes a few kB


@dataclass(frozen=True, kw_only=True)
class Step:
    """One block with its calls, bound for the activation in buffer 0 and in buffer 1."""

    part: PartSpec
    shortcut_part: PartSpec | None
    block: tuple[Call, Call]
    shortcut: tuple[Call, Call] | None
    inputs: tuple[Buffer, Buffer]
    outputs: tuple[Buffer, Buffer]
    emitted: Mapping[str, Buffer]


@dataclass(frozen=True, kw_only=True)
class _RowCall:
    """A part bound to scratch memory for some number of rows."""

    gathered: Buffer
    call: Call
    result: Buffer
    emitted: Mapping[str, Buffer]


Shares = dict[tuple[tuple[int | str, ...], int], float]  # by activation shape, and the bit length of the batch size


class RowRunner:
    """Runs steps on some rows of batches of one size.

    Args:
        shares: from which share of its images on a batch runs everyone. Measured where it is not known, and shared with
            the runners of other sizes: up to twice as many images take about as long each.
    """

    def __init__(self, binder: Binder, shares: Shares) -> None:
        self._binder = binder
        self._n_images = binder.n_images
        self._shares = shares
        self._row_calls: dict[tuple[str, int], _RowCall] = {}
        self._aside: dict[tuple[str, int], Call] = {}  # shortcuts into scratch memory
        self._scratches: dict[tuple[str, tuple[int, ...], str], Buffer] = {}

    def run(self, step: Step, side: int, kept: np.ndarray, controller: Controller) -> int:
        """Run a block on the rows that keep it, its shortcut on the others; return where the activation is now.

        Only rows that change are moved: where the block has no shortcut part, the dropped images stay where they are.

        Args:
            side: the buffer of the pair, 0 or 1, that holds the activation.
            kept: the rows that keep the block, int [n]; some, but not all.
        """
        if self._takes_everyone(step, side, len(kept)):
            return self._run_everyone(step, side, kept, controller)
        in_place = step.shortcut_part is None
        before, after = step.inputs[side], step.inputs[side] if in_place else step.outputs[side]
        results = self._run_rows(step.part, before, after, kept)
        if step.shortcut_part is not None:
            self._run_rows(step.shortcut_part, before, after, self._others(kept))
        if results:
            emitted = {name: self._spread(buffer.read()[: len(kept)], kept) for name, buffer in results.items()}
            controller.observe(step.part.index or 0, emitted)
        return side if in_place else side ^ 1

    def _takes_everyone(self, step: Step, side: int, n_kept: int) -> bool:
        n_run = max(n_kept, self._binder.min_batch)
        if self._binder.backend.plans_by_batch or n_run >= self._n_images:
            return True
        # everyone cannot be cheaper for half of the images or fewer, however quick the block: nothing to measure then
        return 2 * n_run > self._n_images and n_run >= self._everyone_from(step, side)

    def _run_everyone(self, step: Step, side: int, kept: np.ndarray, controller: Controller) -> int:
        """Run a block on all images; those that drop it get what they had, or what the shortcut makes of it."""
        step.block[side]()
        instead = step.inputs[side] if step.shortcut_part is None else self._run_aside(step.shortcut_part, step, side)
        step.outputs[side].copy_rows(instead, self._others(kept))
        if step.emitted:
            emitted = {name: self._spread(buffer.read()[kept], kept) for name, buffer in step.emitted.items()}
            controller.observe(step.part.index or 0, emitted)
        return side ^ 1

    def _run_aside(self, shortcut: PartSpec, step: Step, side: int) -> Buffer:
        """Run a shortcut on all images, into scratch memory."""
        result = self._scratch(shortcut.outputs[0], "out")
        if (shortcut.name, side) not in self._aside:
            self._aside[shortcut.name, side] = self._binder.bind(shortcut, [step.inputs[side]], [result])
        self._aside[shortcut.name, side]()
        return result

    def _others(self, rows: np.ndarray) -> np.ndarray:
        return np.delete(np.arange(self._n_images), rows)

    def _everyone_from(self, step: Step, side: int) -> int:
        """Return how many images must keep a block for running everyone to be cheaper than gathering.

        With t the time of the block and c the time of moving an activation, for one image: gathering n of N images
        costs n (t + 2c), running everyone at most N t + 2c (N - n), so everyone wins from n / N = (t + 2c) / (t + 4c).
        Both times are measured once for each activation shape, see `Shares`. Blocks that change the shape or emit
        something gather.
        """
        part, n_images = step.part, self._n_images
        if step.shortcut_part is not None or step.emitted:
            return n_images
        key = part.inputs[0].shape, n_images.bit_length()
        if key not in self._shares:
            everyone = np.arange(n_images)
            scratch = self._scratch(part.inputs[0], "in")
            move_ms = fastest_ms(self._binder.backend, lambda: scratch.gather(step.inputs[side], everyone))
            run_ms = fastest_ms(self._binder.backend, step.block[side])  # writes the buffer that is free now
            self._shares[key] = (run_ms + 2 * move_ms) / (run_ms + 4 * move_ms)
        return math.ceil(n_images * self._shares[key])

    def _run_rows(self, part: PartSpec, before: Buffer, after: Buffer, rows: np.ndarray) -> Mapping[str, Buffer]:
        """Run a part on some rows of `before`, results into the same rows of `after`; return what it emitted.

        Where its engine takes no batch as small, the last row runs several times, as do the rows that are emitted.
        """
        rows = padded(rows, self._binder.min_batch)
        bound = self._row_calls.get((part.name, len(rows)))
        if bound is None:
            bound = self._bind_rows(part, len(rows))
        bound.gathered.gather(before, rows)
        bound.call()
        after.scatter(bound.result, rows)
        return bound.emitted

    def _bind_rows(self, part: PartSpec, n_rows: int) -> _RowCall:
        """Bind a part to scratch memory of `n_rows` rows, and remember it: the same numbers come up again and again."""
        gathered = self._scratch(part.inputs[0], "in").first(n_rows)
        first = part.outputs[0].name
        # what is emitted beside the activation needs memory of its own, though the shape be the same
        roles = {t.name: "out" if t.name == first else f"emitted {t.name}" for t in part.outputs}
        results = {t.name: self._scratch(t, roles[t.name]).first(n_rows) for t in part.outputs}
        call = self._binder.bind(part, [gathered], list(results.values()))
        emitted = {name: buffer for name, buffer in results.items() if name != first}
        if len(self._row_calls) >= MAX_ROW_CALLS:
            self._row_calls.clear()
        bound = _RowCall(gathered=gathered, call=call, result=results[first], emitted=emitted)
        self._row_calls[part.name, n_rows] = bound
        return bound

    def _spread(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        spread = np.zeros((self._n_images, *values.shape[1:]), values.dtype)
        spread[rows] = values
        return spread

    def _scratch(self, tensor: TensorSpec, role: str) -> Buffer:
        """Return memory for the rows that a mixed step moves; one piece for each shape, made when first needed."""
        key = (role, tensor.shape_for(self._n_images), tensor.dtype)
        if key not in self._scratches:
            self._scratches[key] = self._binder.allocate(tensor)
        return self._scratches[key]

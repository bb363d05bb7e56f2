"""How keep bits turn into engine calls. A strategy is chosen once, when the orchestrator is opened."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from bdtool.errors import UsageError
from bdtool.runtime.controllers import Controller, Decision
from bdtool.specs import NetworkSpec, PartSpec, TensorSpec
from engines.base import Backend, Buffer, Call, Engine
from engines.device_array import DeviceArray, DeviceBufferLike, Images, Logits
from engines.device_timer import fastest_ms
from engines.graph_modes import GraphChoice

MAX_LANES = 8  # batch sizes whose buffers are kept; a choice that bounds memory
MAX_ROW_CALLS = 4096  # bindings of parts to some rows of a batch that are kept; each takes a few kB
WrapCall = Callable[[PartSpec, Call], Call]  # lets a profiler time each engine call


class Strategy(Protocol):
    """Runs batches: images in, as the engines take them; logits float32 [N, classes] out, where the images are."""

    # Which images of the last batch ran as one specialised engine, bool [N]; None where there are none such.
    hits: np.ndarray | None = None
    # How CUDA graphs are used; None where the strategy has none.
    graph: GraphChoice | None = None
    # Images on a device that one `run` takes; None: any number.
    max_device_images: int | None = None

    def run(self, images: Images, controller: Controller) -> Logits: ...

    def close(self) -> None:
        """Stop what runs in the background."""


@dataclass(frozen=True, kw_only=True)
class _Step:
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


class ChainStrategy(Strategy):
    """One engine call for each kept block. Buffers are allocated and bound once for each batch size."""

    def __init__(
        self,
        network: NetworkSpec,
        backend: Backend,
        engines: Mapping[str, Engine],
        *,
        wrap: WrapCall = lambda part, call: call,
    ) -> None:
        self._make_lane: Callable[[int], Lane] = lambda n_images: Lane(network, backend, engines, n_images, wrap)
        self._lanes: OrderedDict[int, Lane] = OrderedDict()

    def close(self) -> None:
        """Nothing runs in the background."""

    def run(self, images: Images, controller: Controller) -> Logits:
        lane = self.lane(len(images))
        lane.begin(images, controller)
        lane.finish(controller)
        return take(lane.logits, images)

    def lane(self, n_images: int) -> Lane:
        """Return what is bound for batches of that size."""
        lane = self._lanes.get(n_images)
        if lane is None:
            lane = self._lanes[n_images] = self._make_lane(n_images)
            if len(self._lanes) > MAX_LANES:
                self._lanes.popitem(last=False)
        self._lanes.move_to_end(n_images)
        return lane


def fill(buffer: Buffer, images: Images) -> None:
    """Put images into a buffer, from the host or from the buffer's own device."""
    if isinstance(images, DeviceArray):
        cast(DeviceBufferLike, buffer).copy_from(images)  # the orchestrator has asked the backend
    else:
        buffer.write(images)


def take(buffer: Buffer, images: Images) -> Logits:
    """Return a copy of a buffer's content: on the host, or on the buffer's own device, if the images are there."""
    if isinstance(images, DeviceArray):
        return cast(DeviceBufferLike, buffer).copy_out()
    return buffer.read().copy()


def take_behind(buffer: Buffer, images: Images) -> Callable[[], Logits]:
    """Begin to take a buffer's content; what is returned gives it once another buffer was read, without a wait."""
    if isinstance(images, DeviceArray):
        return lambda: take(buffer, images)  # nobody waits for it
    return buffer.begin_read().copy


def joined(parts: Sequence[Logits]) -> Logits:
    """Return the logits of images that ran one at a time; those of a single one, on a device, stay where they are."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])


def _kept_rows(keep: Decision, n_images: int) -> bool | np.ndarray:
    """Return the rows that keep a block; a bool where all images agree: no engine is called for an empty batch."""
    if isinstance(keep, bool):
        return keep
    rows = np.flatnonzero(np.broadcast_to(keep, n_images))
    return len(rows) > 0 if len(rows) in (0, n_images) else rows


class Lane:
    """Everything bound for one batch size: two buffers for each activation shape, between which blocks ping-pong.

    An engine never reads and writes the same buffer, so each is bound twice: from buffer 0 to 1, and from 1 to 0.
    """

    def __init__(
        self, network: NetworkSpec, backend: Backend, engines: Mapping[str, Engine], n_images: int, wrap: WrapCall
    ) -> None:
        self._n_images = n_images
        self._backend = backend
        self._engines = engines
        self._wrap = wrap
        self._pairs: dict[tuple[tuple[int, ...], str], tuple[Buffer, Buffer]] = {}
        self._everyone: dict[tuple[int | str, ...], int] = {}
        self._row_calls: dict[tuple[str, int], _RowCall] = {}
        self._aside: dict[tuple[str, int], Call] = {}  # shortcuts into scratch memory
        self._scratches: dict[tuple[str, tuple[int, ...], str], Buffer] = {}
        stem, head = network.require("stem"), network.require("head")
        self.image = self._allocate(stem.inputs[0])
        self.logits = self._allocate(head.outputs[0])
        self._bind_policy(network)
        self._stem = self._bind(stem, [self.image], [self._pair(stem.outputs[0])[0]])
        self._steps = [self._step(part, network.shortcut(k)) for k, part in enumerate(network.blocks)]
        first, second = self._pair(head.inputs[0])
        self._head = (self._bind(head, [first], [self.logits]), self._bind(head, [second], [self.logits]))

    def begin(self, images: Images, controller: Controller) -> None:
        """Put the images into their buffer and let the controller look at them."""
        fill(self.image, images)
        controller.begin(self._n_images, self._probabilities)

    def finish(self, controller: Controller) -> None:
        """Run stem, blocks and head on the images in the buffer, into `logits`."""
        self._stem()
        side = 0  # which buffer holds the activation now
        for k, step in enumerate(self._steps):
            kept = _kept_rows(controller.keep(k), self._n_images)
            if kept is True:
                step.block[side]()
                side ^= 1
                if step.emitted:
                    controller.observe(k, {name: buffer.read() for name, buffer in step.emitted.items()})
            elif kept is False:
                if step.shortcut is not None:
                    step.shortcut[side]()
                    side ^= 1
            else:
                side = self._run_mixed(step, side, kept, controller)
        self._head[side]()

    def _run_mixed(self, step: _Step, side: int, kept: np.ndarray, controller: Controller) -> int:
        """Run a block on the rows that keep it, its shortcut on the others; return where the activation is now.

        Only rows that change are moved: where the block has no shortcut part, the dropped images stay where they are.
        """
        if self._takes_everyone(step, side, len(kept)):
            return self._run_everyone(step, side, kept, controller)
        in_place = step.shortcut_part is None
        before, after = step.inputs[side], step.inputs[side] if in_place else step.outputs[side]
        results = self._run_rows(step.part, before, after, kept)
        if step.shortcut_part is not None:
            self._run_rows(step.shortcut_part, before, after, self._others(kept))
        if results:
            emitted = {name: self._spread(buffer.read(), kept) for name, buffer in results.items()}
            controller.observe(step.part.index or 0, emitted)
        return side if in_place else side ^ 1

    def _takes_everyone(self, step: _Step, side: int, n_kept: int) -> bool:
        if self._backend.plans_by_batch:
            return True
        # everyone cannot be cheaper for half of the images or fewer, however quick the block: nothing to measure then
        return 2 * n_kept > self._n_images and n_kept >= self._everyone_from(step, side)

    def _run_everyone(self, step: _Step, side: int, kept: np.ndarray, controller: Controller) -> int:
        """Run a block on all images; those that drop it get what they had, or what the shortcut makes of it."""
        step.block[side]()
        instead = step.inputs[side] if step.shortcut_part is None else self._run_aside(step.shortcut_part, step, side)
        step.outputs[side].copy_rows(instead, self._others(kept))
        if step.emitted:
            emitted = {name: self._spread(buffer.read()[kept], kept) for name, buffer in step.emitted.items()}
            controller.observe(step.part.index or 0, emitted)
        return side ^ 1

    def _run_aside(self, shortcut: PartSpec, step: _Step, side: int) -> Buffer:
        """Run a shortcut on all images, into scratch memory."""
        result = self._scratch(shortcut.outputs[0], "out")
        if (shortcut.name, side) not in self._aside:
            self._aside[shortcut.name, side] = self._bind(shortcut, [step.inputs[side]], [result])
        self._aside[shortcut.name, side]()
        return result

    def _others(self, rows: np.ndarray) -> np.ndarray:
        return np.delete(np.arange(self._n_images), rows)

    def _everyone_from(self, step: _Step, side: int) -> int:
        """Return how many images must keep a block for running everyone to be cheaper than gathering.

        With t the time of the block and c the time of moving an activation, for one image: gathering n of N images
        costs n (t + 2c), running everyone at most N t + 2c (N - n), so everyone wins from n / N = (t + 2c) / (t + 4c).
        Both times are measured once for each activation shape. Blocks that change the shape or emit something gather.
        """
        part, n_images = step.part, self._n_images
        if step.shortcut_part is not None or step.emitted:
            return n_images
        key = part.inputs[0].shape
        if key not in self._everyone:
            everyone = np.arange(n_images)
            scratch = self._scratch(part.inputs[0], "in")
            move_ms = fastest_ms(self._backend, lambda: scratch.gather(step.inputs[side], everyone))
            run_ms = fastest_ms(self._backend, step.block[side])  # writes the buffer that is free now
            self._everyone[key] = math.ceil(n_images * (run_ms + 2 * move_ms) / (run_ms + 4 * move_ms))
        return self._everyone[key]

    def _run_rows(self, part: PartSpec, before: Buffer, after: Buffer, rows: np.ndarray) -> Mapping[str, Buffer]:
        """Run a part on some rows of `before`, results into the same rows of `after`; return what it emitted."""
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
        results = {tensor.name: self._scratch(tensor, "out").first(n_rows) for tensor in part.outputs}
        call = self._wrap(part, self._engines[part.name].bind({part.inputs[0].name: gathered}, results))
        first = part.outputs[0].name
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
            self._scratches[key] = self._allocate(tensor)
        return self._scratches[key]

    def _probabilities(self) -> np.ndarray:
        if self._policy is None:
            raise UsageError("the bundle has no policy network; give a POLICY")
        call, result = self._policy
        call()
        return result.read()

    def _bind_policy(self, network: NetworkSpec) -> None:
        part = network.find("policy")
        self._policy: tuple[Call, Buffer] | None = None
        if part is not None:
            result = self._allocate(part.outputs[0])
            self._policy = (self._bind(part, [self.image], [result]), result)

    def _step(self, part: PartSpec, shortcut: PartSpec | None) -> _Step:
        inputs, outputs = self._pair(part.inputs[0]), self._pair(part.outputs[0])
        emitted = {tensor.name: self._allocate(tensor) for tensor in part.outputs if tensor.name in part.emits}

        def calls(spec: PartSpec, extra: list[Buffer]) -> tuple[Call, Call]:
            return (
                self._bind(spec, [inputs[0]], [outputs[1], *extra]),
                self._bind(spec, [inputs[1]], [outputs[0], *extra]),
            )

        return _Step(
            part=part,
            shortcut_part=shortcut,
            block=calls(part, list(emitted.values())),
            shortcut=None if shortcut is None else calls(shortcut, []),
            inputs=inputs,
            outputs=(outputs[1], outputs[0]),
            emitted=emitted,
        )

    def _bind(self, part: PartSpec, inputs: list[Buffer], outputs: list[Buffer]) -> Call:
        call = self._engines[part.name].bind(
            {tensor.name: buffer for tensor, buffer in zip(part.inputs, inputs, strict=True)},
            {tensor.name: buffer for tensor, buffer in zip(part.outputs, outputs, strict=True)},
        )
        return self._wrap(part, call)

    def _pair(self, tensor: TensorSpec) -> tuple[Buffer, Buffer]:
        key = (tensor.shape_for(self._n_images), tensor.dtype)
        if key not in self._pairs:
            self._pairs[key] = (self._allocate(tensor), self._allocate(tensor))
        return self._pairs[key]

    def _allocate(self, tensor: TensorSpec) -> Buffer:
        return self._backend.allocate(tensor.shape_for(self._n_images), tensor.dtype)

"""Strategy `chain`: one engine call for each kept block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial

import numpy as np

from bdtool.errors import UsageError
from bdtool.runtime.binding import Binder
from bdtool.runtime.controllers import Controller, Decision
from bdtool.runtime.rows import RowRunner, Shares, Step
from bdtool.runtime.strategies import MAX_LANES, Outcome, Strategy, WrapCall, fill, take
from bdtool.specs import NetworkSpec, PartSpec, TensorSpec
from engines.base import Backend, Buffer, Call, Engine
from engines.device_array import Images
from engines.engine_set import smallest_batch_of


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
        self._network = network
        least = smallest_batch_of(engines)
        self._binder_for = partial(Binder, backend=backend, engines=engines, wrap=wrap, min_batch=least)
        self._lanes: OrderedDict[int, Lane] = OrderedDict()
        self._shares: Shares = {}  # outlive lanes: to measure takes longer than a batch

    def close(self) -> None:
        """Nothing runs in the background."""

    def run(self, images: Images, controller: Controller) -> Outcome:
        lane = self.lane(len(images))
        lane.begin(images, controller)
        lane.finish(controller)
        return Outcome(take(lane.logits, images))

    def lane(self, n_images: int) -> Lane:
        """Return what is bound for batches of that size."""
        lane = self._lanes.get(n_images)
        if lane is None:
            lane = self._lanes[n_images] = Lane(self._network, self._binder_for(n_images=n_images), self._shares)
            if len(self._lanes) > MAX_LANES:
                self._lanes.popitem(last=False)
        self._lanes.move_to_end(n_images)
        return lane


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

    def __init__(self, network: NetworkSpec, binder: Binder, shares: Shares) -> None:
        self._n_images = binder.n_images
        self._binder = binder
        self._rows = RowRunner(binder, shares)
        self._pairs: dict[tuple[tuple[int, ...], str], tuple[Buffer, Buffer]] = {}
        stem, head = network.require("stem"), network.require("head")
        self.image = binder.allocate(stem.inputs[0])
        self.logits = binder.allocate(head.outputs[0])
        self._bind_policy(network)
        self._stem = binder.bind(stem, [self.image], [self._pair(stem.outputs[0])[0]])
        self._steps = [self._step(part, network.shortcut(k)) for k, part in enumerate(network.blocks)]
        first, second = self._pair(head.inputs[0])
        self._head = (binder.bind(head, [first], [self.logits]), binder.bind(head, [second], [self.logits]))

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
                side = self._rows.run(step, side, kept, controller)
        self._head[side]()

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
            result = self._binder.allocate(part.outputs[0])
            self._policy = (self._binder.bind(part, [self.image], [result]), result)

    def _step(self, part: PartSpec, shortcut: PartSpec | None) -> Step:
        inputs, outputs = self._pair(part.inputs[0]), self._pair(part.outputs[0])
        emitted = {tensor.name: self._binder.allocate(tensor) for tensor in part.outputs if tensor.name in part.emits}

        def calls(spec: PartSpec, extra: list[Buffer]) -> tuple[Call, Call]:
            return (
                self._binder.bind(spec, [inputs[0]], [outputs[1], *extra]),
                self._binder.bind(spec, [inputs[1]], [outputs[0], *extra]),
            )

        return Step(
            part=part,
            shortcut_part=shortcut,
            block=calls(part, list(emitted.values())),
            shortcut=None if shortcut is None else calls(shortcut, []),
            inputs=inputs,
            outputs=(outputs[1], outputs[0]),
            emitted=emitted,
        )

    def _pair(self, tensor: TensorSpec) -> tuple[Buffer, Buffer]:
        key = (tensor.shape_for(self._n_images), tensor.dtype)
        if key not in self._pairs:
            self._pairs[key] = (self._binder.allocate(tensor), self._binder.allocate(tensor))
        return self._pairs[key]

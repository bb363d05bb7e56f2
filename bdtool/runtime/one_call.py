"""The whole network, policy included, as one engine call an image: an `If` for each block, or a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bdtool.errors import EngineError, UsageError
from bdtool.runtime.controllers import Controller, MaskController
from bdtool.runtime.strategies import Outcome, Strategy, WrapCall, fill, joined, take_behind
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import Backend, Buffer, Call, Engine
from engines.device_array import Images, Logits
from engines.dispatch import NOT_FINITE
from engines.engine_set import EngineSet
from export.fused_spec import FORCE_DROP, FORCE_KEEP, fused_spec


class Force:
    """The buffer, uint8 [K], that says whether the policy decides on a block (0), or it is kept (1) or dropped (2).

    It is written when that changes: on a GPU each copy costs as much as a small kernel. All who write it share this.
    """

    def __init__(self, buffer: Buffer, n_blocks: int) -> None:
        self._buffer = buffer
        self._free = np.zeros(n_blocks, dtype=np.uint8)
        self._written: bytes | None = None

    def give(self, keep: np.ndarray | None) -> None:
        """Let the next calls keep what a mask bool [K] keeps; None: what the policy does."""
        force = self._free if keep is None else np.where(keep, FORCE_KEEP, FORCE_DROP).astype(np.uint8)
        if (wanted := force.tobytes()) != self._written:
            self._written = None  # until it is there
            self._buffer.write(force)
            self._written = wanted


@dataclass(frozen=True, kw_only=True)
class BoundNetwork:
    """A whole network bound to buffers for one image; `call` runs it, policy included."""

    image: Buffer
    force: Force
    logits: Buffer
    keep: Buffer  # what was kept, [K]
    call: Call


def fused_strategy(
    network: NetworkSpec, backend: Backend, engines: Mapping[str, Engine], *, wrap: WrapCall
) -> Strategy:
    """Return a strategy on one engine with an `If` for each block."""
    if not isinstance(engines, EngineSet):
        raise TypeError(f"strategy 'fused' joins engines and needs an EngineSet, got {type(engines).__name__}")
    spec = fused_spec(network)
    return OneCallStrategy(spec, _bound(spec, engines.fuse(network), backend), wrap=wrap)


def _bound(spec: PartSpec, engine: Engine, backend: Backend) -> BoundNetwork:
    buffers = [backend.allocate(tensor.shape_for(1), tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)]
    image, force, logits, keep = buffers
    inputs = {tensor.name: buffer for tensor, buffer in zip(spec.inputs, (image, force), strict=True)}
    outputs = {tensor.name: buffer for tensor, buffer in zip(spec.outputs, (logits, keep), strict=True)}
    forced = Force(force, *spec.inputs[1].shape_for(1))
    return BoundNetwork(image=image, force=forced, logits=logits, keep=keep, call=engine.bind(inputs, outputs))


class OneCallStrategy(Strategy):
    """Runs images one at a time through an engine that decides by itself unless bits are given.

    Args:
        spec: describes the call.
        known: masks (bytes of bool [K]) that have a specialised path inside; None where there are no such.
    """

    max_device_images = 1

    def __init__(
        self, spec: PartSpec, bound: BoundNetwork, *, wrap: WrapCall, known: frozenset[bytes] | None = None
    ) -> None:
        self._name = spec.name
        self._bound = bound
        self._call = wrap(spec, bound.call)
        self._known = known

    def run(self, images: Images, controller: Controller) -> Outcome:
        if not isinstance(controller, MaskController):
            raise UsageError(
                f"strategy {self._name!r} decides inside its engine: it takes the learned policy or given bits only"
            )
        rows = [self._run_one(images[i : i + 1], controller.given, i) for i in range(len(images))]
        kept = np.stack([keep for _, keep in rows])
        controller.begin(len(images), lambda: kept.astype(np.float32))
        hits = None if self._known is None else np.array([keep.tobytes() in self._known for keep in kept])
        return Outcome(joined([logits for logits, _ in rows]), hits)

    def give(self, keep: np.ndarray | None) -> None:
        """Put the bits of the next image, bool [K] or None, where its call reads them; `run` does so, too."""
        self._bound.force.give(keep)

    def close(self) -> None:
        """Nothing runs in the background."""

    def _run_one(self, image: Images, given: np.ndarray | None, row: int) -> tuple[Logits, np.ndarray]:
        fill(self._bound.image, image)
        self.give(None if given is None else given[row])
        self._call()
        logits = take_behind(self._bound.logits, image)
        keep = self._bound.keep.read()
        if (keep == NOT_FINITE).any():
            raise EngineError(
                f"the policy network's probabilities are not finite (block {int(keep.argmax())}); run `bdtool verify` "
                "on the bundle, and check the input"
            )
        return logits(), keep.astype(bool)

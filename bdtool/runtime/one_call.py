"""The whole network, policy included, as one engine call an image: an `If` for each block, or a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bdtool.errors import EngineError, UsageError
from bdtool.runtime.controllers import Controller, MaskController
from bdtool.runtime.strategies import Strategy, WrapCall, fill
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import Backend, Engine
from engines.device_array import Images
from engines.graph_modes import GraphChoice
from engines.store import EngineSet
from export.fused import FORCE_DROP, FORCE_KEEP, fused_spec

_NOT_FINITE = 2  # in the place of a keep bit, as `engines.dispatch` says it


def fused_strategy(
    network: NetworkSpec, backend: Backend, engines: Mapping[str, Engine], *, wrap: WrapCall
) -> Strategy:
    """Return a strategy on one engine with an `If` for each block."""
    if not isinstance(engines, EngineSet):
        raise TypeError(f"strategy 'fused' joins engines and needs an EngineSet, got {type(engines).__name__}")
    return OneCallStrategy(fused_spec(network), engines.fuse(network), backend, wrap=wrap)


def graph_strategy(
    network: NetworkSpec, backend: Backend, engines: Mapping[str, Engine], *, wrap: WrapCall
) -> Strategy:
    """Return a strategy on a CUDA graph with a SWITCH for each block: the decision never leaves the device."""
    from engines.graph_engine import GraphEngine, graph_spec

    return OneCallStrategy(graph_spec(network), GraphEngine(network, backend, engines), backend, wrap=wrap)


class OneCallStrategy:
    """Runs images one at a time through an engine that decides by itself unless bits are given.

    Args:
        spec: inputs image and force (0: the policy decides, 1: keep, 2: drop), outputs logits and keep.
    """

    hits: np.ndarray | None = None
    graph: GraphChoice | None = None

    def __init__(self, spec: PartSpec, engine: Engine, backend: Backend, *, wrap: WrapCall) -> None:
        self._name = spec.name
        image, force = spec.inputs
        logits, keep = spec.outputs
        self._image = backend.allocate(image.shape_for(1), image.dtype)
        self._force = backend.allocate(force.shape_for(1), force.dtype)
        self._logits = backend.allocate(logits.shape_for(1), logits.dtype)
        self._keep = backend.allocate(keep.shape_for(1), keep.dtype)
        call = engine.bind(
            {image.name: self._image, force.name: self._force}, {logits.name: self._logits, keep.name: self._keep}
        )
        self._call = wrap(spec, call)
        self._free = np.zeros(force.shape_for(1), dtype=np.uint8)
        self._written: np.ndarray | None = None  # what `force` holds

    def run(self, images: Images, controller: Controller) -> np.ndarray:
        if not isinstance(controller, MaskController):
            raise UsageError(
                f"strategy {self._name!r} decides inside its engine: it takes the learned policy or given bits only"
            )
        rows = [self._run_one(images[i : i + 1], controller.given, i) for i in range(len(images))]
        kept = np.stack([keep for _, keep in rows])
        controller.begin(len(images), lambda: kept.astype(np.float32))
        return np.concatenate([logits for logits, _ in rows])

    def close(self) -> None:
        """Nothing runs in the background."""

    def _run_one(self, image: Images, given: np.ndarray | None, row: int) -> tuple[np.ndarray, np.ndarray]:
        fill(self._image, image)
        force = self._free if given is None else _forced(given[row])
        if force is not self._written:  # on a GPU each copy costs as much as a small kernel
            self._force.write(force)
            self._written = force
        self._call()
        keep = self._keep.read()
        if (keep == _NOT_FINITE).any():
            raise EngineError(
                f"the policy network's probabilities are not finite (block {int(keep.argmax())}); run `bdtool verify` "
                "on the bundle, and check the input"
            )
        return self._logits.read().copy(), keep.astype(bool)


def _forced(keep: np.ndarray) -> np.ndarray:
    return np.where(keep, FORCE_KEEP, FORCE_DROP).astype(np.uint8)

"""The whole network, policy included, as one engine with an `If` for each block: one call an image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bdtool.errors import UsageError
from bdtool.runtime.controllers import Controller, MaskController
from bdtool.runtime.strategies import WrapCall
from bdtool.specs import NetworkSpec
from engines.base import Backend, Engine
from engines.store import EngineSet
from export.fused import FORCE_DROP, FORCE_KEEP, fused_spec


class FusedStrategy:
    """Runs images one at a time through a fused engine, which decides by itself unless bits are given."""

    hits: np.ndarray | None = None

    def __init__(
        self,
        network: NetworkSpec,
        backend: Backend,
        engines: Mapping[str, Engine],
        *,
        wrap: WrapCall = lambda part, call: call,
    ) -> None:
        if not isinstance(engines, EngineSet):
            raise TypeError(f"strategy 'fused' joins engines and needs an EngineSet, got {type(engines).__name__}")
        spec = fused_spec(network)
        image, force = spec.inputs
        logits, keep = spec.outputs
        self._image = backend.allocate(image.shape_for(1), image.dtype)
        self._force = backend.allocate(force.shape_for(1), force.dtype)
        self._logits = backend.allocate(logits.shape_for(1), logits.dtype)
        self._keep = backend.allocate(keep.shape_for(1), keep.dtype)
        call = engines.fuse(network).bind(
            {image.name: self._image, force.name: self._force}, {logits.name: self._logits, keep.name: self._keep}
        )
        self._call = wrap(spec, call)
        self._free = np.zeros(force.shape_for(1), dtype=np.uint8)

    def run(self, images: np.ndarray, controller: Controller) -> np.ndarray:
        if not isinstance(controller, MaskController):
            raise UsageError(
                "strategy 'fused' decides inside its engine: it takes the learned policy or given bits only"
            )
        rows = [self._run_one(images[i : i + 1], controller.given, i) for i in range(len(images))]
        kept = np.stack([keep for _, keep in rows])
        controller.begin(len(images), lambda: kept.astype(np.float32))
        return np.concatenate([logits for logits, _ in rows])

    def close(self) -> None:
        """Nothing runs in the background."""

    def _run_one(self, image: np.ndarray, given: np.ndarray | None, row: int) -> tuple[np.ndarray, np.ndarray]:
        self._image.write(image)
        self._force.write(self._free if given is None else _forced(given[row]))
        self._call()
        return self._logits.read().copy(), self._keep.read().copy()


def _forced(keep: np.ndarray) -> np.ndarray:
    return np.where(keep, FORCE_KEEP, FORCE_DROP).astype(np.uint8)

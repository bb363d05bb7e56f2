"""One specialised engine for each frequent keep mask: the kept parts joined, so that an image takes two engine calls.

Images concentrate on few masks (the authors: 469 among 10,000 CIFAR-10 images, 10 on ImageNet). A path engine is
joined from the engines of its parts, in milliseconds, so nothing but the list of masks is stored on disk and every
weight is stored once. A mask that has no engine yet runs through the chain, and gives the same logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import cast

import numpy as np

from bdtool.errors import UsageError
from bdtool.runtime.chain import ChainStrategy, Lane
from bdtool.runtime.controllers import Controller, MaskController
from bdtool.runtime.path_cache import PathCache, PathEngine, PathOptions
from bdtool.runtime.strategies import Outcome, Strategy, WrapCall, take
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import Backend, Call, Engine, JoinedEngine
from engines.device_array import DeviceArray, Images
from engines.engine_set import EngineSet


class PathStrategy(Strategy):
    """Two engine calls an image, policy and path, for masks that have a path engine; the chain for the others."""

    def __init__(
        self,
        network: NetworkSpec,
        backend: Backend,
        engines: Mapping[str, Engine],
        *,
        wrap: WrapCall = lambda part, call: call,
        options: PathOptions | None = None,
    ) -> None:
        if not isinstance(engines, EngineSet):
            raise TypeError(f"strategy 'path' joins engines and needs an EngineSet, got {type(engines).__name__}")
        self._network = network
        self._engines = engines
        self._wrap = wrap
        self._plans_by_batch = backend.plans_by_batch
        self._chain = ChainStrategy(network, backend, engines, wrap=wrap)
        self._part = network.whole("path", flops=0)  # its FLOPs depend on the mask
        self.cache = PathCache(self._join, options or PathOptions())

    def run(self, images: Images, controller: Controller) -> Outcome:
        lane = self._chain.lane(len(images))
        lane.begin(images, controller)
        mask = controller.mask
        if mask is None:
            raise UsageError(
                "strategy 'path' needs every keep bit before block 0; this controller finds them on the way"
            )
        if len(mask) > 1 and (mask != mask[0]).any():
            return self._run_groups(images, mask)
        path = self.cache.get(mask[0], len(mask))
        if path is None:
            lane.finish(controller)
        else:
            self._call(path, lane)()
        return Outcome(take(lane.logits, images), _all_alike(len(mask), path is not None))

    def close(self) -> None:
        self.cache.close()

    def _run_groups(self, images: Images, mask: np.ndarray) -> Outcome:
        """Run the images of each mask that has an engine together, and the others as one batch of the chain."""
        # rows on a device could not be picked, and groups have a size of their own each
        if isinstance(images, DeviceArray) or self._plans_by_batch:
            ran = self._chain.run(images, MaskController(mask, threshold=self._network.threshold))
            return Outcome(ran.logits, _all_alike(len(mask), False))
        groups, group_of = np.unique(mask, axis=0, return_inverse=True)
        logits = np.empty((len(images), self._network.n_classes), dtype=np.float32)
        hits = np.zeros(len(images), dtype=bool)
        for index, bits in enumerate(groups):
            rows = np.flatnonzero(group_of == index)
            path = self.cache.get(bits, len(rows))
            if path is not None:
                hits[rows] = True
                logits[rows] = self._run_once(path, images[rows])
        if not hits.all():
            rest = MaskController(mask[~hits], threshold=self._network.threshold)
            logits[~hits] = cast(np.ndarray, self._chain.run(images[~hits], rest).logits)  # as the images are
        return Outcome(logits, hits)

    def _run_once(self, path: PathEngine, images: np.ndarray) -> np.ndarray:
        """Run a path engine without bound buffers: groups have too many sizes to keep some for each."""
        results: dict[str, np.ndarray] = {}
        self._wrap(self._part, lambda: results.update(path.engine.run({self._part.inputs[0].name: images})))()
        return results[self._part.outputs[0].name]

    def _call(self, path: PathEngine, lane: Lane) -> Call:
        call = path.calls.get(lane)
        if call is None:
            call = path.engine.bind({self._part.inputs[0].name: lane.image}, {self._part.outputs[0].name: lane.logits})
            call = path.calls[lane] = self._wrap(self._part, call)
        return call

    def _join(self, mask: np.ndarray) -> JoinedEngine:
        return self._engines.join(self._part, parts_of_path(self._network, mask))


@lru_cache(maxsize=64)
def _all_alike(n_images: int, hit: bool) -> np.ndarray:
    """Return bool [N], read-only and made once: for one image, making it would take as long as a small engine call."""
    hits = np.full(n_images, hit)
    hits.flags.writeable = False
    return hits


def parts_of_path(network: NetworkSpec, mask: np.ndarray) -> list[PartSpec]:
    """Return the parts that run for a keep mask bool [K]: stem, kept blocks and shortcuts of dropped ones, head."""
    if mask.shape != (network.n_blocks,):
        raise UsageError(
            f"a mask of shape {list(mask.shape)} has no path; this network's masks have {network.n_blocks} bits"
        )
    parts = [network.require("stem")]
    for k, block in enumerate(network.blocks):
        shortcut = network.shortcut(k)
        if mask[k]:
            parts.append(block)
        elif shortcut is not None:
            parts.append(shortcut)
    return [*parts, network.require("head")]

"""CUDA graph mode "path-cache": the policy is read back, and the flat graph of its mask launched."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from bdtool.errors import UsageError
from bdtool.runtime.controllers import Controller, MaskController
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.strategies import Outcome, Strategy, WrapCall, fill, joined, take
from bdtool.specs import NetworkSpec
from engines.base import Call
from engines.device_array import Images, Logits
from engines.network_graphs import NetworkGraphs


class PathCacheStrategy(Strategy):
    """Reads each image's policy back and launches the graph of its mask; of too many the least recently used goes."""

    max_device_images = 1

    def __init__(self, network: NetworkSpec, graphs: NetworkGraphs, *, wrap: WrapCall, options: PathOptions) -> None:
        self._part = network.whole("path", flops=0)  # its FLOPs depend on the mask
        self._graphs = graphs
        self._wrap = wrap
        self._max_paths = options.max_paths
        policy, part = graphs.policy(), network.find("policy")
        self._policy = None if policy is None or part is None else wrap(part, policy)
        self._paths: OrderedDict[bytes, Call] = OrderedDict()
        self._frequent = options.frequent()
        self.prepare()

    def prepare(self) -> None:
        """Keep the graphs of the frequent masks, and no others."""
        self._paths.clear()
        for mask, _ in reversed(self._frequent):  # the most frequent one is dropped last
            self._path(mask)

    def run(self, images: Images, controller: Controller) -> Outcome:
        if not isinstance(controller, MaskController):
            raise UsageError(
                "strategy 'graph' needs every keep bit before block 0; this controller finds them on the way"
            )
        rows = [self._run_one(images[i : i + 1], controller.for_image(i)) for i in range(len(images))]
        probabilities = [probability for probability, _, _ in rows]
        controller.begin(len(images), lambda: np.concatenate([p for p in probabilities if p is not None]))
        hits = np.array([hit for _, hit, _ in rows])
        return Outcome(joined([logits for _, _, logits in rows]), hits)

    def close(self) -> None:
        self._paths.clear()

    def _run_one(self, image: Images, controller: MaskController) -> tuple[np.ndarray | None, bool, Logits]:
        """Return P(keep) where the policy ran, whether the mask's graph was there, and the logits."""
        read: list[np.ndarray] = []

        def probabilities() -> np.ndarray:
            if self._policy is None:
                raise UsageError("the bundle has no policy network; give a POLICY")
            self._policy()
            read.append(self._graphs.probability.read().copy())
            return read[0]

        fill(self._graphs.image, image)
        controller.begin(1, probabilities)
        path, hit = self._path(controller.matrix[0])
        path()
        return (read[0] if read else None), hit, take(self._graphs.logits, image)

    def _path(self, mask: np.ndarray) -> tuple[Call, bool]:
        """Return the launch of a mask's graph, and whether it was there already."""
        key = mask.tobytes()
        found = self._paths.get(key)
        if found is not None:
            self._paths.move_to_end(key)
            return found, True
        made = self._paths[key] = self._wrap(self._part, self._graphs.path(mask))
        if len(self._paths) > self._max_paths:
            self._paths.popitem(last=False)
        return made, False

"""Which CUDA graph mode is the fastest here, by the device's own times."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bdtool.runtime.chain import ChainStrategy
from bdtool.runtime.controllers import MaskController
from bdtool.runtime.one_call import OneCallStrategy
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.path_graphs import PathCacheStrategy
from bdtool.specs import NetworkSpec
from engines.base import Backend
from engines.device_timer import DeviceTimer, timer_of

GraphStrategy = ChainStrategy | OneCallStrategy | PathCacheStrategy

_IMAGES, _ROUNDS = 10, 4  # that each mode runs when modes are compared; the fastest round of a mask counts


class ModeComparison:
    """What an image takes in each mode, by events, with the policy network. Images are blank, and their bits given.

    The graphs that decide have these bits beforehand: they are copied for no image whose policy is learned.

    An image has a frequent mask as often as was noted, or else one that no mode was prepared for: where no masks were
    noted, nothing is known of those to come, and each is a new one.
    """

    def __init__(
        self, found: Mapping[str, GraphStrategy], network: NetworkSpec, backend: Backend, options: PathOptions
    ) -> None:
        self.found = found
        self.new_share = 1 - options.frequent_share()
        self._network, self._backend, self._frequent = network, backend, options.frequent()

    def measured_ms(self) -> dict[str, float]:
        """Return the mean milliseconds of an image in each mode."""
        timer = timer_of(self._backend)
        if timer is None:
            raise TypeError(f"modes are compared by a device's events, which {type(self._backend).__name__} has not")
        times = dict.fromkeys(self.found, 0.0)
        for share, masks in ((1 - self.new_share, self._known_masks), (self.new_share, self._new_masks)):
            if share > 0:
                for mode, ms in self._mean_times(masks(), timer).items():
                    times[mode] += share * ms
        for strategy in self.found.values():
            if isinstance(strategy, PathCacheStrategy):
                strategy.prepare()  # it keeps graphs of the new masks, in place of frequent ones
        return times

    def _mean_times(self, masks: np.ndarray, timer: DeviceTimer) -> dict[str, float]:
        """Return by mode the mean over images, each in its fastest round; modes take turns."""
        source = self._network.require("stem").inputs[0]
        image = np.zeros(source.shape_for(1), source.dtype)
        times: dict[str, list[float]] = {mode: [] for mode in self.found}
        for mask in (masks[0], *masks):  # the first image in a mode sets things up, and is not counted
            for mode, strategy in self.found.items():
                _time_one(strategy, image, mask[None], self._network, timer, times[mode])
        return {mode: float(np.reshape(ms[1:], (_ROUNDS, _IMAGES)).min(axis=0).mean()) for mode, ms in times.items()}

    def _known_masks(self) -> np.ndarray:
        """Return bool [_ROUNDS * _IMAGES, K]: the frequent masks, each as often as it comes up, the same each round."""
        ends = np.cumsum([share for _, share in self._frequent])
        found = np.searchsorted(ends, (np.arange(_IMAGES) + 0.5) / _IMAGES * ends[-1])
        return np.array([self._frequent[i][0] for i in found] * _ROUNDS)

    def _new_masks(self) -> np.ndarray:
        """Return bool [_ROUNDS * _IMAGES, K]: masks that are not among the frequent ones, as many as there are."""
        n_blocks = self._network.n_blocks
        drawn = np.random.default_rng(0).random((4 * _ROUNDS * _IMAGES, n_blocks)) < 0.5
        known = {mask.tobytes() for mask, _ in self._frequent}
        new = {mask.tobytes(): mask for mask in drawn if mask.tobytes() not in known}
        return np.resize(list(new.values()) or drawn, (_ROUNDS * _IMAGES, n_blocks))


def try_out(strategy: GraphStrategy, network: NetworkSpec) -> None:
    """Run a blank image that keeps every block: a graph that was built may still not start, for want of memory.

    Raises:
        EngineError: it does not run.
    """
    source, every = network.require("stem").inputs[0], np.ones((1, network.n_blocks), bool)
    strategy.run(np.zeros(source.shape_for(1), source.dtype), MaskController(every, threshold=network.threshold))


def _time_one(
    strategy: GraphStrategy,
    image: np.ndarray,
    mask: np.ndarray,
    network: NetworkSpec,
    timer: DeviceTimer,
    times_ms: list[float],
) -> None:
    controller = MaskController(mask, threshold=network.threshold, run_policy=network.has_policy)
    if isinstance(strategy, OneCallStrategy):
        strategy.give(mask[0])

    def run() -> None:
        strategy.run(image, controller)

    timer.timed(run, times_ms.append)()
    timer.collect()

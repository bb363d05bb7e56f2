"""Engines for larger batches than the one at hand, by a TensorRT profile: its last image runs as often as it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from bdtool.errors import DataError
from bdtool.runtime.controllers import Controller, Decision
from bdtool.runtime.strategies import Outcome, Strategy
from engines.device_array import DeviceArray, Images
from engines.graph_modes import GraphChoice


class PaddedStrategy(Strategy):
    """Gives another strategy `min_batch` images or more; nobody else sees those that are added.

    They keep what the last image of the batch keeps, so that no block runs for them alone.
    """

    def __init__(self, strategy: Strategy, min_batch: int) -> None:
        self._strategy = strategy
        self._min_batch = min_batch

    @property
    def graph(self) -> GraphChoice | None:  # type: ignore[override]  # it may come to be another one
        return self._strategy.graph

    def run(self, images: Images, controller: Controller) -> Outcome:
        n_images = len(images)
        if n_images >= self._min_batch:
            return self._strategy.run(images, controller)
        if isinstance(images, DeviceArray):
            raise DataError(
                f"images: {n_images} on the GPU remain for one call, the engines take {self._min_batch} at least. Pass "
                "that many or a multiple, pass them from the host, or build engines with a smaller --min-batch"
            )
        ran = self._strategy.run(padded(images, self._min_batch), _PaddedController(controller, n_images))
        return Outcome(ran.logits[:n_images], None if ran.hits is None else ran.hits[:n_images])

    def close(self) -> None:
        self._strategy.close()


class _PaddedController(Controller):
    """Decides for a padded batch as another controller does for the `n_images` that it begins with."""

    def __init__(self, controller: Controller, n_images: int) -> None:
        self._controller = controller
        self._n_images = n_images
        self._n_padded = n_images

    def begin(self, n_images: int, probabilities: Callable[[], np.ndarray]) -> None:
        self._n_padded = n_images
        self._controller.begin(self._n_images, lambda: probabilities()[: self._n_images])

    def keep(self, k: int) -> Decision:
        kept = self._controller.keep(k)
        return kept if isinstance(kept, bool) else padded(kept, self._n_padded)

    def observe(self, k: int, emitted: Mapping[str, np.ndarray]) -> None:
        self._controller.observe(k, {name: values[: self._n_images] for name, values in emitted.items()})

    @property
    def mask(self) -> np.ndarray | None:
        mask = self._controller.mask
        return None if mask is None else padded(mask, self._n_padded)

    @property
    def matrix(self) -> np.ndarray:
        return padded(self._controller.matrix, self._n_padded)


def padded(rows: np.ndarray, n_rows: int) -> np.ndarray:
    """Return `rows` with the last one repeated until they are `n_rows`; as they are where they are as many or more."""
    missing = n_rows - len(rows)
    return rows if missing <= 0 else np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])

"""What runs the two forms of images: as a bundle's engines read them, and preprocessed where these are pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bdtool.errors import DataError
from bdtool.runtime.loading import Loaded
from bdtool.runtime.path_cache import PathStats
from bdtool.runtime.paths import PathStrategy
from bdtool.runtime.strategies import Strategy
from engines.base import Engine
from engines.graph_modes import GraphChoice


class ImageForms:
    """The engines and the strategy for each form; those for preprocessed images are made when the first of them come.

    Args:
        loaded: engines that take images as `Loaded.network` says.
        make: makes the strategy on engines.
        load_preprocessed: gives engines for preprocessed images, where those of `loaded` take pixels.

    Attributes:
        strategy: runs images as `loaded` takes them.
        load_preprocessed: as it was given.
    """

    def __init__(
        self, loaded: Loaded, make: Callable[[Loaded], Strategy], load_preprocessed: Callable[[], Loaded] | None
    ) -> None:
        self.loaded = loaded
        self.strategy = make(loaded)
        self.load_preprocessed = load_preprocessed
        self._make = make
        self._other: Strategy | None = None  # for preprocessed images
        self._ran_other = False

    def strategy_for(self, *, preprocessed: bool) -> Strategy:
        """Return what runs images as they come now.

        Raises:
            DataError: they are preprocessed, and nothing gives engines for them.
            EngineError: such an engine does not build, or cannot be loaded.
        """
        self._ran_other = preprocessed
        if not preprocessed:
            return self.strategy
        if self._other is None:
            self._other = self._make(self._preprocessed())
        return self._other

    def engines_for(self, *, preprocessed: bool) -> Mapping[str, Engine]:
        """Return the engines for images of one form; errors as of `strategy_for`."""
        return self._preprocessed().engines if preprocessed else self.loaded.engines

    @property
    def graph(self) -> GraphChoice | None:
        """How the strategy that ran last uses CUDA graphs; None where it has none."""
        return (self._other or self.strategy).graph if self._ran_other else self.strategy.graph

    @property
    def path_stats(self) -> PathStats | None:
        """What the path caches of both strategies have done; None where they have none."""
        stats = [one.cache.stats for one in (self.strategy, self._other) if isinstance(one, PathStrategy)]
        return sum(stats[1:], start=stats[0]) if stats else None

    def close(self) -> None:
        for strategy in (self.strategy, self._other):
            if strategy is not None:
                strategy.close()

    def _preprocessed(self) -> Loaded:
        if self.load_preprocessed is None:
            raise DataError(
                "images: got preprocessed float32, these engines take pixels. Pass uint8 [N, H, W, 3], or open the "
                "bundle with Orchestrator.open, which builds engines for both"
            )
        return self.load_preprocessed()

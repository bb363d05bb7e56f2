"""`Place`: where and how engines run, the choices that commands share."""

from __future__ import annotations

import os
from dataclasses import dataclass

from bdtool.runtime.factory import DEFAULT_STRATEGY
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from engines.base import DEFAULT_BACKEND, DEFAULT_DEVICE
from engines.graph_modes import AUTO as AUTO_GRAPH
from engines.registry import identify_backend
from engines.store import EngineStore
from export.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where engines run, and which parts; each attribute as `Orchestrator.open` takes it."""

    backend: str = DEFAULT_BACKEND
    device: str = DEFAULT_DEVICE
    threads: int | None = None
    precision: str = "fp32"
    cuda_graph: str = AUTO_GRAPH

    def open(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        strategy: str = DEFAULT_STRATEGY,
        *,
        paths: PathOptions | None = None,
    ) -> Orchestrator:
        """Open a bundle here; see `Orchestrator.open` for errors."""
        return Orchestrator.open(
            bundle,
            backend=self.backend,
            device=self.device,
            strategy=strategy,
            threads=self.threads,
            precision=self.precision,
            paths=paths,
            cuda_graph=self.cuda_graph,
        )

    def store(self, bundle: Bundle) -> EngineStore:
        """Return the store of the bundle's engines for this place.

        Raises:
            BundleError: the bundle has no parts of the precision, and the backend makes none.
            UsageError: no such precision, backend or device.
        """
        return EngineStore(bundle, identify_backend(self.backend, self.device), precision=self.precision)

"""What a bundle opens to: a backend, engines, and what its strategy needs to know."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from bdtool.runtime.factory import parts_for, require_strategy
from bdtool.runtime.loading import Loader
from bdtool.runtime.masks import MaskCount, noted_masks
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.recommendation import AUTO, read_recommendation
from bdtool.specs import NetworkSpec
from engines.base import Backend, BackendIdentity, Engine, full_device_name
from engines.graph_modes import GraphPlan
from engines.registry import batch_options, identify_backend, open_backend, plan_graphs
from engines.store import EngineStore
from engines.trt_options import TensorRTOptions, options_from_settings
from export.bundle import Bundle

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenedEngines:
    """A bundle's engines at one place, of the parts that `strategy` needs."""

    network: NetworkSpec  # as the engines take it
    backend: Backend
    engines: Mapping[str, Engine]
    strategy: str  # what "auto" stood for
    paths: PathOptions | None
    graphs: GraphPlan | None
    loader: Loader


def open_engines(
    bundle: Bundle,
    *,
    backend: str,
    device: str,
    strategy: str,
    threads: int | None,
    precision: str,
    paths: PathOptions | None,
    cuda_graph: str,
) -> OpenedEngines:
    """Load the engines of a bundle, those that it lacks built first; arguments and errors as `Orchestrator.open`."""
    device = full_device_name(device)
    if strategy != AUTO:
        parts_for(strategy, bundle.network)  # refuse an unknown one before the backend is opened
        require_strategy(strategy, backend, device)
    identity = identify_backend(backend, device)
    graphs = plan_graphs(backend, device, cuda_graph)
    options = _build_options(bundle, identity, precision)
    settings = "" if options is None else options.settings
    store = EngineStore(bundle, identity, precision=precision, settings=settings)
    library = open_backend(backend, device, threads=threads, tensorrt=options)
    if strategy == AUTO:
        recorded = read_recommendation(store.directory, threads=library.threads, bundle=bundle.path)
        strategy = recorded.strategy
        logger.info("strategy auto: %s, recorded at batch %d", strategy, recorded.batch)
    loader = Loader(bundle, store, library, strategy=strategy)
    loaded = loader.load()
    if strategy in ("path", "graph") and paths is None:
        # those of a read-only bundle may have been built elsewhere: what was noted beside engines is in the bundle
        beside = loader.store if loader.store.directory.is_relative_to(bundle.engines_path) else store
        masks = noted_masks(beside.directory, loaded.network.n_blocks, precision=precision)
        paths = PathOptions.of_counts(masks or _own_mask(loaded.network))
    return OpenedEngines(
        network=loaded.network,
        backend=library,
        engines=loaded.engines,
        strategy=strategy,
        paths=paths,
        graphs=graphs,
        loader=loader,
    )


def _own_mask(network: NetworkSpec) -> list[MaskCount]:
    return [] if network.mask is None else [MaskCount(mask=network.mask, share=1.0)]


def _build_options(bundle: Bundle, identity: BackendIdentity, precision: str) -> TensorRTOptions | None:
    """Return what engines are built with that the bundle lacks; None for a backend whose engines take any batch.

    As those that it has: they run together, and engines of one batch size with none of another.
    """
    options = batch_options(identity.name, bundle.manifest.max_batch, precision=precision)
    if options is None:
        return None
    found = EngineStore(bundle, identity, precision=precision).found_settings()
    return options if found is None else options_from_settings(found) or options

"""The strategies by name."""

from __future__ import annotations

from collections.abc import Mapping

from bdtool.errors import UsageError
from bdtool.runtime.fused import FusedStrategy
from bdtool.runtime.paths import PathOptions, PathStrategy
from bdtool.runtime.strategies import ChainStrategy, FullStrategy, Strategy, WrapCall
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import Backend, Engine

STRATEGIES = ("chain", "path", "fused", "full")
DEFAULT_STRATEGY = "chain"


def parts_for(strategy: str, network: NetworkSpec) -> list[PartSpec]:
    """Return the parts whose engines a strategy needs.

    Raises:
        UsageError: no such strategy.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {strategy!r}; this version has {', '.join(STRATEGIES)}")
    return [part for part in network.parts if (part.kind == "full") == (strategy == "full")]


def make_strategy(
    strategy: str,
    network: NetworkSpec,
    backend: Backend,
    engines: Mapping[str, Engine],
    *,
    wrap: WrapCall = lambda part, call: call,
    paths: PathOptions | None = None,
) -> Strategy:
    """Return the strategy on loaded engines; `wrap` goes around each engine call, for profiling."""
    if strategy == "path":
        return PathStrategy(network, backend, engines, wrap=wrap, options=paths)
    if strategy == "fused":
        return FusedStrategy(network, backend, engines, wrap=wrap)
    if strategy == "full":
        return FullStrategy(network, backend, engines, wrap=wrap)
    return ChainStrategy(network, backend, engines, wrap=wrap)

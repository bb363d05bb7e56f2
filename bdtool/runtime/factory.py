"""The strategies by name."""

from __future__ import annotations

from collections.abc import Mapping

from bdtool.errors import BdtoolError, UsageError
from bdtool.runtime.chain import ChainStrategy
from bdtool.runtime.full import FullStrategy
from bdtool.runtime.one_call import fused_strategy
from bdtool.runtime.padding import PaddedStrategy
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.paths import PathStrategy
from bdtool.runtime.strategies import Strategy, WrapCall
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import Backend, Engine, context_of
from engines.engine_set import smallest_batch_of
from engines.graph_modes import GraphPlan
from engines.registry import fuses, joins, plan_graphs, require_graphs

STRATEGIES = ("chain", "path", "fused", "graph", "full")
DEFAULT_STRATEGY = "chain"
ONE_BY_ONE = ("path", "graph")  # also of a batch they run single images


def parts_for(strategy: str, network: NetworkSpec) -> list[PartSpec]:
    """Return the parts whose engines a strategy needs.

    Raises:
        UsageError: no such strategy.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {strategy!r}; this version has {', '.join(STRATEGIES)} and auto")
    return [part for part in network.parts if (part.kind == "full") == (strategy == "full")]


def strategies_for(backend: str, device: str) -> tuple[str, ...]:
    """Return the names of the strategies that this backend has on this device, here."""
    return tuple(name for name in STRATEGIES if _is_had(name, backend, device))


def require_strategy(strategy: str, backend: str, device: str) -> None:
    """Raise unless the backend has this strategy on this device, here.

    Raises:
        UsageError: it has not.
        BackendError: what the strategy needs is not installed, or too old.
    """
    if strategy == "graph":
        require_graphs(backend, device)
    elif not _is_had(strategy, backend, device):
        others = ", ".join(strategies_for(backend, device))
        raise UsageError(
            f"backend {backend!r} has no strategy {strategy!r}, only {others}; or use --backend onnxruntime"
        )


def _is_had(strategy: str, backend: str, device: str) -> bool:
    if strategy == "graph":
        try:
            plan = plan_graphs(backend, device)
        except BdtoolError:
            return False
        return plan is not None and plan.replays  # without any graph it would be the chain
    if strategy == "path":
        return joins(backend)
    return fuses(backend) if strategy == "fused" else True


def make_strategy(
    strategy: str,
    network: NetworkSpec,
    backend: Backend,
    engines: Mapping[str, Engine],
    *,
    wrap: WrapCall = lambda part, call: call,
    paths: PathOptions | None = None,
    graphs: GraphPlan | None = None,
) -> Strategy:
    """Return the strategy on loaded engines.

    Args:
        wrap: goes around each engine call, for profiling.
        graphs: the CUDA graphs that `graph` and `full` may use.

    Raises:
        UsageError: the strategy runs images one at a time, and the engines take no such batch.
    """
    least = smallest_batch_of(engines)
    if least > 1 and strategy in ONE_BY_ONE:
        raise UsageError(
            f"strategy {strategy!r} runs single images, the engines take {least} at least. Use --strategy chain, or "
            "build them with --min-batch 1"
        )
    with context_of(backend)():
        if strategy == "path":
            made: Strategy = PathStrategy(network, backend, engines, wrap=wrap, options=paths)
        elif strategy == "fused":
            made = fused_strategy(network, backend, engines, wrap=wrap)
        elif strategy == "graph":
            from bdtool.runtime.graph import graph_strategy  # only GPUs need it

            made = graph_strategy(network, backend, engines, wrap=wrap, paths=paths, graphs=graphs)
        elif strategy == "full":
            made = FullStrategy(network, backend, engines, wrap=wrap, graphs=graphs)
        else:
            made = ChainStrategy(network, backend, engines, wrap=wrap)
    return made if least == 1 else PaddedStrategy(made, least)

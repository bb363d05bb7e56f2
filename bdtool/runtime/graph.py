"""Strategy `graph`: CUDA graphs for single images, in the mode that is had here and was measured to be the fastest.

The modes, as `engines.graph_modes` names them: "policy-cache" and "switch" decide on the device with one launch an
image; "path-cache" reads the policy back, which any driver with CUDA graphs can, and launches the flat graph of the
mask; "off" is the chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bdtool.errors import BackendError, EngineError, UsageError
from bdtool.runtime.chain import ChainStrategy
from bdtool.runtime.graph_comparison import GraphStrategy, ModeComparison, try_out
from bdtool.runtime.masks import NOTE_MASKS
from bdtool.runtime.one_call import BoundNetwork, Force, OneCallStrategy
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.path_graphs import PathCacheStrategy
from bdtool.runtime.strategies import Strategy, WrapCall
from bdtool.specs import NetworkSpec
from bdtool.words import counted, percent
from engines.base import Backend, Call, Engine
from engines.dispatch import MAX_BLOCKS
from engines.graph_modes import OFF, PATH_CACHE, POLICY_CACHE, SWITCH, GraphChoice, GraphPlan
from engines.network_graphs import NetworkGraphs, graph_spec
from engines.speculation import Speculation

ONLY_SWITCH = GraphPlan(modes=(SWITCH,), is_forced=True)
_NO_MASKS = f"no frequent masks are known; note some with {NOTE_MASKS}, or give PathOptions(ahead=...)"


def graph_strategy(
    network: NetworkSpec,
    backend: Backend,
    engines: Mapping[str, Engine],
    *,
    wrap: WrapCall,
    paths: PathOptions | None,
    graphs: GraphPlan | None,
) -> Strategy:
    """Return the strategy in the fastest mode of the plan; `graph` of it says which that is, and why.

    Args:
        paths: bounds of the graphs of known masks (`max_paths`), and the frequent masks (`ahead`).
        graphs: the modes that may be used; where there are several, they are timed on a few images. None: "switch".

    Raises:
        UsageError: a mode was asked for that this network or the known masks do not allow; or the backend's engines
            cannot be captured.
        EngineError, BackendError: in the mode that was asked for, or in every one, a part cannot be captured, the
            kernels do not compile, or the driver refuses a step.
    """
    plan, options = graphs or ONLY_SWITCH, paths or PathOptions()
    missing = {**plan.missing, **_unfit(network, options)}
    if plan.is_forced and plan.modes[0] in missing:
        raise UsageError(f"CUDA graph mode {plan.modes[0]!r}: {missing[plan.modes[0]]}")
    makers = _Makers(network, backend, engines, options, wrap, plan.speculation)
    found: dict[str, GraphStrategy] = {}
    for mode in (mode for mode in plan.modes if mode not in missing):
        try:
            made = makers.make(mode)
            if not plan.is_forced:
                try_out(made, network)
            found[mode] = made
        except (BackendError, EngineError) as exc:
            if mode == plan.modes[-1]:  # the one that was asked for, or nothing is left
                raise
            missing[mode] = str(exc)
    choice = _choose(plan, missing, ModeComparison(found, network, backend, options))
    if choice.mode == POLICY_CACHE and makers.speculation is not None:
        choice = replace(choice, reason=choice.reason + _begun(makers.speculation), speculation=makers.speculation)
    if choice.mode != PATH_CACHE:
        makers.release()  # only that one makes graphs later on
    strategy = found[choice.mode]
    strategy.graph = choice
    return strategy


class _Makers:
    """Makes the strategy of each mode; all of them share what is captured once."""

    def __init__(
        self,
        network: NetworkSpec,
        backend: Backend,
        engines: Mapping[str, Engine],
        options: PathOptions,
        wrap: WrapCall,
        speculation: Speculation | None,
    ) -> None:
        self._network, self._backend, self._engines = network, backend, engines
        self._options = options
        self._wrap = wrap
        self._graphs: NetworkGraphs | None = None
        self._force: Force | None = None  # of the graphs
        self.speculation = speculation  # of `policy-cache`; None: it is yet to be found

    def make(self, mode: str) -> GraphStrategy:
        if mode == OFF:
            return ChainStrategy(self._network, self._backend, self._engines, wrap=self._wrap)
        if self._graphs is None:
            self._graphs = NetworkGraphs(self._network, self._backend, self._engines)
        if mode == PATH_CACHE:
            return PathCacheStrategy(self._network, self._graphs, wrap=self._wrap, options=self._options)
        if mode == POLICY_CACHE:
            return self._policy_cache(self._graphs)
        return self._one_call(self._graphs, self._graphs.deciding())

    def release(self) -> None:
        if self._graphs is not None:
            self._graphs.release()

    def _policy_cache(self, graphs: NetworkGraphs) -> OneCallStrategy:
        masks, shares = zip(*self._options.frequent(), strict=True)
        if self.speculation is None:
            self.speculation = graphs.speculation(masks, shares)
        known = frozenset(mask.tobytes() for mask in masks)
        return self._one_call(graphs, graphs.deciding(masks, self.speculation), known=known)

    def _one_call(self, graphs: NetworkGraphs, call: Call, *, known: frozenset[bytes] | None = None) -> OneCallStrategy:
        if self._force is None:
            self._force = Force(graphs.force, self._network.n_blocks)
        bound = BoundNetwork(image=graphs.image, force=self._force, logits=graphs.logits, keep=graphs.kept, call=call)
        return OneCallStrategy(graph_spec(self._network), bound, wrap=self._wrap, known=known)


def _unfit(network: NetworkSpec, options: PathOptions) -> dict[str, str]:
    """Return the modes that this network cannot run in, whatever the machine, and why."""
    if network.n_blocks > MAX_BLOCKS:
        reason = f"its kernel decides on at most {MAX_BLOCKS} blocks, and this network has {network.n_blocks}"
        return dict.fromkeys((POLICY_CACHE, SWITCH), reason)
    return {} if len(options.ahead) else {POLICY_CACHE: _NO_MASKS}  # it may be one array [n, K]


def _choose(plan: GraphPlan, missing: Mapping[str, str], comparison: ModeComparison) -> GraphChoice:
    modes = list(comparison.found)
    if plan.is_forced:
        return GraphChoice(mode=modes[0], reason="asked for")
    without = "".join(f"; not {mode}: {reason}" for mode, reason in missing.items())
    if len(modes) == 1:
        return GraphChoice(mode=modes[0], reason=f"the only one here{without}")
    measured = comparison.measured_ms()
    fastest = min(measured, key=lambda mode: measured[mode])  # of equal ones the first
    times = ", ".join(f"{mode} {ms:.3f} ms" for mode, ms in measured.items())
    reason = f"the fastest here, {comparison.new_share:.0%} of the images with a mask never seen: {times}{without}"
    return GraphChoice(mode=fastest, reason=reason, measured_ms=measured)


def _begun(speculation: Speculation) -> str:
    """Say what runs beside the policy network, if anything does."""
    if not speculation.runs:
        return ""
    begun = f"{counted(len(speculation.runs), 'part')} that {percent(speculation.share, 0)} of the images begin with"
    return f"; beside the policy network: the {begun}"

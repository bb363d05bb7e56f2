"""Strategy `graph`: CUDA graphs for single images, in the mode that is had here and was measured to be the fastest.

The modes, as `engines.graph_modes` names them: "policy-cache" and "switch" decide on the device with one launch an
image; "path-cache" reads the policy back, which any driver with CUDA graphs can, and launches the flat graph of the
mask; "off" is the chain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from bdtool.errors import BackendError, EngineError, UsageError
from bdtool.runtime.chain import ChainStrategy
from bdtool.runtime.controllers import Controller, MaskController
from bdtool.runtime.masks import NOTE_MASKS
from bdtool.runtime.one_call import BoundNetwork, Force, OneCallStrategy
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.strategies import Outcome, Strategy, WrapCall, fill, joined, take
from bdtool.specs import NetworkSpec
from engines.base import Backend, Call, Engine
from engines.device_array import Images, Logits
from engines.device_timer import DeviceTimer, timer_of
from engines.dispatch import MAX_BLOCKS
from engines.graph_modes import OFF, PATH_CACHE, POLICY_CACHE, SWITCH, GraphChoice, GraphPlan
from engines.network_graphs import NetworkGraphs, graph_spec
from engines.speculation import Speculation

ONLY_SWITCH = GraphPlan(modes=(SWITCH,), is_forced=True)
_IMAGES, _ROUNDS = 10, 4  # that each mode runs when modes are compared; the fastest round of a mask counts
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
            found[mode] = makers.make(mode)
        except (BackendError, EngineError) as exc:
            if mode == plan.modes[-1]:  # the one that was asked for, or nothing is left
                raise
            missing[mode] = str(exc)
    choice = _choose(plan, missing, _Comparison(found, network, backend, options))
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


GraphStrategy = ChainStrategy | OneCallStrategy | PathCacheStrategy


def _unfit(network: NetworkSpec, options: PathOptions) -> dict[str, str]:
    """Return the modes that this network cannot run in, whatever the machine, and why."""
    if network.n_blocks > MAX_BLOCKS:
        reason = f"its kernel decides on at most {MAX_BLOCKS} blocks, and this network has {network.n_blocks}"
        return dict.fromkeys((POLICY_CACHE, SWITCH), reason)
    return {} if options.ahead else {POLICY_CACHE: _NO_MASKS}


def _choose(plan: GraphPlan, missing: Mapping[str, str], comparison: _Comparison) -> GraphChoice:
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
    n_parts, share = len(speculation.runs), speculation.share
    return f"; the {n_parts} part(s) that {100 * share:.0f} % of the images begin with run beside the policy network"


class _Comparison:
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

"""Open the strategies to measure, `path` with its engines joined before the clock starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from bdtool.errors import UsageError
from bdtool.profiling.workload import BASELINE, PRECISIONS, Contender, Workload, contender_of
from bdtool.runtime.factory import parts_for, require_strategy, strategies_for
from bdtool.runtime.masks import NOTE_MASKS, count_masks, noted_masks
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.place import Place
from bdtool.runtime.recommendation import AUTO, CANDIDATES
from bdtool.specs import NetworkSpec
from engines.graph_modes import GRAPH_MODES, GraphChoice
from engines.registry import plan_graphs
from export.bundle import Bundle

STORED = "noted by `bdtool build --paths` or `--coverage`"
COUNTED = "counted on the measured images before the clock started"
HAVE_GRAPHS = (BASELINE, "graph")  # strategies that use CUDA graphs on a GPU
_KNOW_MASKS = ("path", "graph")  # strategies that prepare for frequent masks


@dataclass(frozen=True)
class Prepared:
    """The frequent masks that a strategy is prepared for, and where they come from."""

    options: PathOptions
    source: str
    precision: str


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Everything that takes turns: `full` first, the strategies, then another bundle's `full:<arch>`."""

    runtimes: dict[str, Orchestrator]
    paths: dict[str, Prepared]  # of those that prepare for frequent masks

    @property
    def of_bundle(self) -> dict[str, Orchestrator]:
        """The runtimes of the bundle itself."""
        return {name: runtime for name, runtime in self.runtimes.items() if ":" not in name}

    @property
    def max_batch(self) -> int:
        """The largest batch that everything here takes at once."""
        return min(runtime.max_batch for runtime in self.runtimes.values())

    @property
    def min_batch(self) -> int:
        """The smallest batch that everything here takes as it is."""
        return max(runtime.min_batch for runtime in self.runtimes.values())

    def graph_choices(self) -> dict[str, GraphChoice]:
        """Return how each strategy that has CUDA graphs uses them."""
        choices = {name: runtime.graph_choice for name, runtime in self.runtimes.items()}
        return {name: choice for name, choice in choices.items() if choice is not None}

    def path_figures(self) -> dict[str, dict[str, Any]]:
        """Return what the path cache of each `path` strategy holds."""
        stats = {name: runtime.path_stats for name, runtime in self.runtimes.items()}
        return {
            name: {
                "paths": held.n_paths,
                "path_bytes": held.n_bytes,
                "path_bytes_bound": held.max_bytes,
                "path_masks": self.paths[name].source,
            }
            for name, held in stats.items()
            if held is not None
        }

    def mask_warnings(self) -> list[str]:
        """Say where strategies were prepared for the very masks that they were timed on, for each precision."""
        counted = {name: one for name, one in self.paths.items() if one.source == COUNTED}
        knew: dict[tuple[str, int], list[str]] = {}
        for name, one in counted.items():
            knew.setdefault((one.precision, len(one.options.ahead)), []).append(f"`{name}`")
        return [
            f"no frequent masks are noted for {precision}, so {' and '.join(names)} knew the {n_masks} masks of the "
            f"timed images beforehand; other images may have others, and take longer. Note some with {NOTE_MASKS}"
            for (precision, n_masks), names in knew.items()
            if n_masks > 1
        ]


def require_batch(batch: int, bundles: Sequence[Bundle]) -> None:
    """Refuse batches that would run in slices and be reported as one.

    Raises:
        UsageError: a bundle was exported for smaller ones.
    """
    for bundle in bundles:
        limit = bundle.manifest.max_batch
        if batch > limit:
            raise UsageError(
                f"--batch {batch}: {bundle.path} was exported with --max-batch {limit}, so that a request would run in "
                f"slices of {limit}. Give --batch {limit} or less, or export with --max-batch {batch}"
            )


def strategy_names(asked: Sequence[str], network: NetworkSpec, place: Place) -> list[str]:
    """Return the strategies to measure, the baseline first; `auto` stands for all there that take a policy.

    A name may go on with a precision (`chain@int8`), or with a CUDA graph mode (`full@off`, `graph@switch`): the same
    strategy beside itself in another.

    Raises:
        UsageError: no such strategy, precision or mode, or the backend has none such.
        BackendError: what a strategy needs is not installed, or too old.
    """
    there = [name for name in strategies_for(place.backend, place.device) if name in CANDIDATES]
    named = [name for word in asked for name in (there if word == AUTO else (word,))]
    names = [BASELINE, *(name for name in dict.fromkeys(named) if name != BASELINE)]
    for name in names:  # refuse one now, not after building engines
        contender = contender_of(name)
        if contender.strategy == AUTO:
            raise UsageError(
                f"strategy {name!r}: {AUTO!r} takes no precision or CUDA graph mode. Give --precision or --cuda-graph, "
                f"or name strategies ({', '.join(there)})"
            )
        parts_for(contender.strategy, network)
        require_strategy(contender.strategy, place.backend, place.device)
        if contender.cuda_graph is not None:
            _require_mode(name, contender, place)
    _refuse_twins(names, place)
    return names


def _refuse_twins(names: Sequence[str], place: Place) -> None:
    """Refuse what would be measured twice, under two names."""
    seen: dict[tuple[str, Place], str] = {}
    for name in names:
        contender = contender_of(name)
        first = seen.setdefault((contender.strategy, contender.place(place)), name)
        if first != name:
            raise UsageError(f"strategies {first!r} and {name!r} are the same here; leave one of them out")


def _require_mode(name: str, contender: Contender, place: Place) -> None:
    if contender.cuda_graph not in GRAPH_MODES:
        raise UsageError(
            f"strategy {name!r}: {contender.cuda_graph!r} is neither a precision ({', '.join(PRECISIONS)}) nor a CUDA "
            f"graph mode ({', '.join(GRAPH_MODES)})"
        )
    if contender.strategy not in HAVE_GRAPHS:
        raise UsageError(
            f"strategy {name!r}: CUDA graph modes are of {' and '.join(HAVE_GRAPHS)}, not of {contender.strategy!r}"
        )
    plan_graphs(place.backend, place.device, contender.cuda_graph)


def open_all(
    bundle: Bundle,
    names: Sequence[str],
    workload: Workload,
    place: Place,
    stack: ExitStack,
    *,
    baseline: Bundle | None = None,
) -> Opened:
    """Open the strategies, and `full` of another bundle under the name `full:<arch>`, until `stack` is closed.

    The engines of `path` are joined here, and no others while the clock runs: a background thread would disturb the
    other strategies, too.

    Raises:
        UsageError: the other bundle takes images of another size.
        BundleError: the bundle has no parts of a precision that a name asks for, and the backend makes none.
        BackendError: engines cannot be built, or backend, device or threads are not to be had.
    """
    if baseline is not None:
        _check_size(bundle, baseline)
    contenders = {name: contender_of(name) for name in names}
    places = {name: contender.place(place) for name, contender in contenders.items()}
    for there in places.values():
        there.store(bundle)  # refuses a precision that is not there before any engine is built
    prepare = cache(lambda there: prepared(bundle, workload, there))  # of contenders that differ in the strategy alone
    runtimes, paths = {}, {}
    for name, contender in contenders.items():
        if contender.strategy in _KNOW_MASKS:
            paths[name] = prepare(replace(places[name], cuda_graph=place.cuda_graph))
        options = paths[name].options if name in paths else None
        runtimes[name] = stack.enter_context(places[name].open(bundle, contender.strategy, paths=options))
    if baseline is not None:
        runtimes[f"{BASELINE}:{baseline.network.arch}"] = stack.enter_context(place.open(baseline, BASELINE))
    return Opened(runtimes=runtimes, paths=paths)


def prepared(bundle: Bundle, workload: Workload, place: Place) -> Prepared:
    """Return the masks to join ahead: those noted in the bundle, else the workload's."""
    store = place.store(bundle)
    directory = store.nearest(parts_for("path", store.network)).directory
    stored = noted_masks(directory, bundle.network.n_blocks, precision=place.precision)
    if stored:
        return Prepared(PathOptions.of_counts(stored, background=False), STORED, place.precision)
    keep = workload.keep if workload.keep is not None else learned_bits(bundle, workload.images, place)
    return Prepared(PathOptions.of_counts(count_masks([keep]), background=False), COUNTED, place.precision)


def learned_bits(bundle: Bundle, images: np.ndarray, place: Place) -> np.ndarray:
    """Return what the policy network keeps, bool [M, K]."""
    with place.open(bundle, "chain") as runtime:
        return runtime.decide(images)


def _check_size(bundle: Bundle, baseline: Bundle) -> None:
    mine, other = bundle.network.preprocessing, baseline.network.preprocessing
    if (mine.height, mine.width) != (other.height, other.width):
        raise UsageError(
            f"--baseline {baseline.path}: takes images of {other.height} x {other.width}, {bundle.path} of "
            f"{mine.height} x {mine.width}. A baseline must run on the same images; give one of that size"
        )

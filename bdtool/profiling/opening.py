"""Open the strategies to measure, `path` with its engines joined before the clock starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bdtool.errors import UsageError
from bdtool.profiling.workload import BASELINE, Workload, split_name
from bdtool.runtime.factory import parts_for, require_strategy, strategies_for
from bdtool.runtime.masks import NOTE_MASKS, count_masks, read_masks
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from bdtool.runtime.place import Place
from bdtool.runtime.recommendation import AUTO, CANDIDATES
from bdtool.specs import NetworkSpec
from engines.graph_modes import GraphChoice
from engines.registry import plan_graphs
from export.bundle import Bundle

STORED = "noted by `bdtool build --paths` or `--coverage`"
COUNTED = "counted on the measured images before the clock started"
HAVE_GRAPHS = (BASELINE, "graph")  # strategies that use CUDA graphs on a GPU


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Everything that takes turns: `full` first, the strategies, then another bundle's `full:<arch>`."""

    runtimes: dict[str, Orchestrator]
    paths: PathOptions | None  # of `path` and `graph`, where they are among them
    path_masks: str  # where its masks come from

    @property
    def of_bundle(self) -> dict[str, Orchestrator]:
        """The runtimes of the bundle itself."""
        return {name: runtime for name, runtime in self.runtimes.items() if ":" not in name}

    @property
    def max_batch(self) -> int:
        """The largest batch that everything here takes at once."""
        return min(runtime.max_batch for runtime in self.runtimes.values())

    def graph_choices(self) -> dict[str, GraphChoice]:
        """Return how each strategy that has CUDA graphs uses them."""
        choices = {name: runtime.graph_choice for name, runtime in self.runtimes.items()}
        return {name: choice for name, choice in choices.items() if choice is not None}

    def path_figures(self) -> dict[str, Any]:
        """Return what the path cache holds; nothing without a `path` strategy."""
        stats = self.runtimes["path"].path_stats if "path" in self.runtimes else None
        if stats is None:
            return {}
        return {
            "paths": stats.n_paths,
            "path_bytes": stats.n_bytes,
            "path_bytes_bound": stats.max_bytes,
            "path_masks": self.path_masks,
        }

    def mask_warnings(self) -> list[str]:
        """Say where strategies were prepared for the very masks that they were timed on."""
        n_masks = 0 if self.paths is None else len(self.paths.ahead)
        if n_masks < 2 or self.path_masks != COUNTED:
            return []
        names = " and ".join(f"`{name}`" for name in self.runtimes if knows_masks(name))
        return [
            f"no frequent masks are noted, so {names} knew the {n_masks} masks of the timed images beforehand; other "
            f"images may have others, and take longer. Note some with {NOTE_MASKS}"
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

    `full@MODE` and `graph@MODE` stand for a strategy in one CUDA graph mode, beside the same one in others.

    Raises:
        UsageError: no such strategy or mode, or the backend has none such.
        BackendError: what a strategy needs is not installed, or too old.
    """
    there = [name for name in strategies_for(place.backend, place.device) if name in CANDIDATES]
    named = [name for word in asked for name in (there if word == AUTO else (word,))]
    names = [BASELINE, *(name for name in dict.fromkeys(named) if name != BASELINE)]
    for name in names:  # refuse one now, not after building engines
        strategy, mode = split_name(name)
        parts_for(strategy, network)
        require_strategy(strategy, place.backend, place.device)
        if mode is None:
            continue
        if strategy not in HAVE_GRAPHS:
            raise UsageError(
                f"strategy {name!r}: CUDA graph modes are of {' and '.join(HAVE_GRAPHS)}, not of {strategy!r}"
            )
        plan_graphs(place.backend, place.device, mode)
    return names


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
        BackendError: engines cannot be built, or backend, device or threads are not to be had.
    """
    if baseline is not None:
        _check_size(bundle, baseline)
    paths, source = path_options(bundle, workload, place) if any(map(knows_masks, names)) else (None, "")
    runtimes = {}
    for name in names:
        strategy, mode = split_name(name)
        there = place if mode is None else replace(place, cuda_graph=mode)
        opened = there.open(bundle, strategy, paths=paths if knows_masks(name) else None)
        runtimes[name] = stack.enter_context(opened)
    if baseline is not None:
        runtimes[f"{BASELINE}:{baseline.network.arch}"] = stack.enter_context(place.open(baseline, BASELINE))
    return Opened(runtimes=runtimes, paths=paths, path_masks=source)


def knows_masks(name: str) -> bool:
    """Say whether what is measured under that name prepares for frequent masks."""
    return split_name(name)[0] in ("path", "graph")


def path_options(bundle: Bundle, workload: Workload, place: Place) -> tuple[PathOptions, str]:
    """Return the masks to join ahead and where they come from: those stored with the engines, else the workload's."""
    store = place.store(bundle)
    stored = read_masks(store.nearest(parts_for("path", store.network)).directory, bundle.network.n_blocks)
    if stored:
        return PathOptions.of_counts(stored, background=False), STORED
    keep = workload.keep if workload.keep is not None else learned_bits(bundle, workload.images, place)
    return PathOptions.of_counts(count_masks([keep]), background=False), COUNTED


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

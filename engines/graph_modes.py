"""How work reaches a GPU: the ways to launch a network there, which of them a machine has, and which was chosen.

Beside plain launches, a CUDA graph replays what is known in advance with one launch (`full`, or a keep mask's path),
and one with conditional nodes decides by itself. Sources: CUDA programming guide, "Conditional Graph Nodes"; CUDA
driver API, `cuGraphInstantiateWithParams` (12.0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bdtool.errors import BackendError, UsageError
from engines.libcuda import Driver

AUTO = "auto"
POLICY_CACHE = "policy-cache"  # on the device: one SWITCH over the paths of frequent masks, `switch` for others
SWITCH = "switch"  # on the device: a SWITCH for every few blocks
PATH_CACHE = "path-cache"  # the policy is read back, then the mask's flat path is launched, from a bounded cache
OFF = "off"  # plain launches
GRAPH_MODES = (AUTO, POLICY_CACHE, SWITCH, PATH_CACHE, OFF)
REPLAY = "replay"  # of one engine, which decides nothing: `full`

_GRAPHS_SINCE, _SWITCH_SINCE = (12, 0), (12, 8)
_INSTALL = 'add it with: pip install "bdtool[cuda]"'


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """The modes that may be used, the preferred first; `missing` says why the others may not."""

    modes: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    is_forced: bool = False  # the user named the mode

    @property
    def replays(self) -> bool:
        """Whether CUDA graphs may be used at all."""
        return self.modes[0] != OFF


@dataclass(frozen=True, kw_only=True)
class GraphChoice:
    """The mode that a strategy runs in, and why."""

    mode: str
    reason: str
    measured_ms: Mapping[str, float] = field(default_factory=dict)  # of one image, where modes were compared


def graphs_of_machine(driver: Driver, is_installed: Callable[[str], bool]) -> GraphPlan:
    """Return what a driver and the installed packages allow.

    Args:
        is_installed: says whether a distribution is there.
    """
    needs = {
        POLICY_CACHE: (_SWITCH_SINCE, ("cuda-bindings", "nvidia-cuda-nvrtc"), "a SWITCH in a CUDA graph"),
        SWITCH: (_SWITCH_SINCE, ("cuda-bindings", "nvidia-cuda-nvrtc"), "a SWITCH in a CUDA graph"),
        PATH_CACHE: (_GRAPHS_SINCE, ("cuda-bindings",), "a CUDA graph"),
    }
    missing = {
        mode: reason
        for mode, (since, packages, what) in needs.items()
        if (reason := _lacks(driver, since, packages, what, is_installed))
    }
    return GraphPlan(modes=tuple(mode for mode in (*needs, OFF) if mode not in missing), missing=missing)


def plan_for(mode: str, there: GraphPlan) -> GraphPlan:
    """Return the plan for the mode that a user asked for, of those that are there.

    Raises:
        UsageError: no such mode.
        BackendError: it is not to be had here.
    """
    if mode not in GRAPH_MODES:
        raise UsageError(f"unknown CUDA graph mode {mode!r}; this version has {', '.join(GRAPH_MODES)}")
    if mode == AUTO:
        return there
    if mode not in there.modes:
        others = ", ".join(there.modes)
        raise BackendError(f"CUDA graph mode {mode!r}: {there.missing[mode]}. Or use one that is there: {others}")
    return GraphPlan(modes=(mode,), missing=there.missing, is_forced=True)


def chosen(plan: GraphPlan | None, choice: GraphChoice) -> GraphPlan:
    """Return the plan that leads to the same choice again, without comparing."""
    return GraphPlan(modes=(choice.mode,), missing={} if plan is None else plan.missing, is_forced=True)


def _lacks(
    driver: Driver, since: tuple[int, int], packages: Sequence[str], what: str, is_installed: Callable[[str], bool]
) -> str | None:
    if driver.cuda_version < since:
        needed = ".".join(map(str, since))
        return f"the driver supports CUDA up to {driver.cuda_text}, {what} needs {needed}; update the driver"
    absent = [package for package in packages if not is_installed(package)]
    return f"{what} needs {absent[0]}; {_INSTALL}" if absent else None

"""How work reaches a GPU: the ways to launch a network there, which of them a machine has, and which was chosen.

Beside plain launches, a CUDA graph replays what is known in advance with one launch (`full`, or a keep mask's path),
and one with conditional nodes decides by itself. Sources: CUDA programming guide, "Conditional Graph Nodes"; CUDA
driver API, `cuGraphInstantiateWithParams` (12.0); release notes of CUDA 12.8 (SWITCH); "CUDA Compatibility", "Minor
version compatibility": machine code loads across the versions of one major, and not in an older.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bdtool.errors import BackendError, UsageError
from engines.extras import install_for
from engines.libcuda import Driver
from engines.speculation import Speculation

AUTO = "auto"
POLICY_CACHE = "policy-cache"  # on the device: one SWITCH over the paths of frequent masks, `switch` for others
SWITCH = "switch"  # on the device: a SWITCH for every few blocks
PATH_CACHE = "path-cache"  # the policy is read back, then the mask's flat path is launched, from a bounded cache
OFF = "off"  # plain launches
GRAPH_MODES = (AUTO, POLICY_CACHE, SWITCH, PATH_CACHE, OFF)
REPLAY = "replay"  # of one engine, which decides nothing: `full`

_GRAPHS_SINCE, _SWITCH_SINCE = (12, 0), (12, 8)
_BINDINGS = "cuda-bindings"
_NVRTC = {"12": "nvidia-cuda-nvrtc-cu12", "13": "nvidia-cuda-nvrtc"}  # by the major version of the bindings


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """The modes to choose from, the preferred first; `missing` says why others are not to be had."""

    modes: tuple[str, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    is_forced: bool = False  # the user named the mode
    speculation: Speculation | None = None  # of POLICY_CACHE, where it was found before

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
    speculation: Speculation | None = None  # of POLICY_CACHE


def graphs_of_machine(driver: Driver, version_of: Callable[[str], str | None]) -> GraphPlan:
    """Return what a driver and the installed packages allow.

    Args:
        version_of: gives the version of an installed distribution, or None.
    """
    needs = {
        POLICY_CACHE: _Need("a SWITCH in a CUDA graph", _SWITCH_SINCE),
        SWITCH: _Need("a SWITCH in a CUDA graph", _SWITCH_SINCE),
        PATH_CACHE: _Need("a CUDA graph", _GRAPHS_SINCE, has_kernels=False),
    }
    missing = {mode: reason for mode, need in needs.items() if (reason := need.lacks(driver, version_of))}
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
    if mode in there.missing:
        others = ", ".join(there.modes)
        raise BackendError(f"CUDA graph mode {mode!r}: {there.missing[mode]}. Or use one that is there: {others}")
    return GraphPlan(modes=(mode,), missing=there.missing, is_forced=True)


def chosen(plan: GraphPlan | None, choice: GraphChoice) -> GraphPlan:
    """Return the plan that leads to the same choice again, without comparing."""
    missing = {} if plan is None else plan.missing
    return GraphPlan(modes=(choice.mode,), missing=missing, is_forced=True, speculation=choice.speculation)


@dataclass(frozen=True)
class _Need:
    """What a way to launch work takes: a driver since some CUDA version, and packages."""

    what: str
    since: tuple[int, int]
    has_kernels: bool = True  # which NVRTC compiles here

    def lacks(self, driver: Driver, version_of: Callable[[str], str | None]) -> str | None:
        """Return why it is not to be had, and what to do; None where it is."""
        if driver.cuda_version < self.since:
            needed = ".".join(map(str, self.since))
            return f"the driver supports CUDA up to {driver.cuda_text}, {self.what} needs {needed}; update the driver"
        install = f"add it with: {install_for('cuda', driver)}"
        bindings = version_of(_BINDINGS)
        if bindings is None:
            return f"{self.what} needs {_BINDINGS}; {install}"
        if not self.has_kernels:
            return None
        major = bindings.partition(".")[0]
        if int(major) > driver.cuda_version[0]:
            return (
                f"{self.what} needs a kernel compiled for the driver's CUDA {driver.cuda_text}, and {_BINDINGS} "
                f"{bindings} compiles for CUDA {major}; {install}"
            )
        nvrtc = _NVRTC.get(major, _NVRTC["13"])
        return None if version_of(nvrtc) else f"{self.what} needs {nvrtc}; {install}"

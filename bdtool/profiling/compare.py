"""Two profiles side by side: what changed, what makes them hard to compare, and what became slower."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdtool.errors import UsageError
from export.files import json_from_bytes

# Where these differ, the figures answer different questions.
_SETTINGS = ("arch", "policy_network", "batch", "boundary", "n_images")
# What was run, by its digest: one thing has many names and paths, and a path many contents. The second key is for
# profiles that have no digest, and where there is nothing to digest.
_CONTENTS = {
    "weights": ("weights_sha256",),
    "images": ("images_sha256", "input_source"),
    "keep_bits": ("keep_sha256", "policy"),
}
_MACHINE = ("cpu", "instruction_set", "processors_available", "cpu_affinity", "threads", "device", "gpu")
_CHOICES = ("precision", "input_source", "policy")  # what one may want to compare, like versions; names of contents
_VERSIONS = ("backend", "driver", "driver_cuda", "os", "python", "numpy", "bdtool")
_FIGURES = {
    "median_ms": ("latency_ms", "median"),
    "p99_ms": ("latency_ms", "p99"),
    "ratio_to_full": ("ratio_to_full",),
    "blocks_mean": ("blocks_mean",),
    "throughput_ips": ("throughput_ips",),
}
_JUDGED = {"median_ms": "median_ms_iqr", "ratio_to_full": "ratio_to_full_iqr"}  # figure: its spread


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure in both profiles; None where a profile lacks it."""

    a: float | None
    b: float | None

    @property
    def relative(self) -> float | None:
        """b / a - 1; None where it is not defined."""
        return None if self.a is None or self.b is None or self.a == 0 else self.b / self.a - 1

    def to_json(self) -> dict[str, float | None]:
        return {"a": self.a, "b": self.b, "change": self.relative}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out. `regressions` are figures that grew by more than the bound and more than their spread.

    Where the profiles are not comparable, as they have no strategy in common, for instance, or one is of an unstable
    run, there is no verdict, and no regressions.
    """

    strategies: dict[str, dict[str, Change]]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    differences: dict[str, tuple[Any, Any]]
    # "a", "b": why its ratios are not to be trusted; empty where both runs were stable
    unstable: dict[str, tuple[str, ...]]
    regressions: dict[str, tuple[str, ...]]  # by strategy: the figures
    max_slowdown: float

    @property
    def ok(self) -> bool:
        """Whether there is a verdict, and nothing became slower."""
        return self.has_verdict and not any(self.regressions.values())

    @property
    def verdict(self) -> str:
        """What a script wants to know: "regression", "no regression", "not comparable" or "unstable"."""
        if self.incomparable:
            return "not comparable"
        if self.unstable:
            return "unstable"
        return "no regression" if self.ok else "regression"

    @property
    def has_verdict(self) -> bool:
        """Whether the profiles can be compared, and both are of stable runs."""
        return not self.incomparable and not self.unstable

    @property
    def incomparable(self) -> tuple[str, ...]:
        """The differences of settings and machine, beside which the figures say little; "strategies" if all differ."""
        return (*_beside(self.differences), *(() if self.strategies else ("strategies",)))

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "comparable": not self.incomparable,
            "stable": not self.unstable,
            "unstable": {side: list(reasons) for side, reasons in self.unstable.items()},
            "max_slowdown": self.max_slowdown,
            "differences": {name: {"a": a, "b": b} for name, (a, b) in self.differences.items()},
            "strategies": {
                name: {
                    **{figure: change.to_json() for figure, change in row.items()},
                    "regressions": list(self.regressions[name]),
                }
                for name, row in self.strategies.items()
            },
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
        }


def read_profile(path: Path) -> dict[str, Any]:
    """Return the JSON of a profile.

    Raises:
        UsageError: the file is not what `bdtool profile --json` writes. Not a failure with exit status 1, which says
            that something became slower.
    """
    try:
        data = json_from_bytes(path.read_bytes())
    except OSError as exc:
        raise UsageError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except ValueError as exc:
        raise UsageError(f"{path}: not JSON ({exc}). Give files of `bdtool profile --json FILE`") from exc
    problem = _problem(data)
    if problem:
        raise UsageError(f"{path}: not a profile: {problem}. Give files of `bdtool profile --json FILE`")
    profile: dict[str, Any] = data
    return profile


def compare_profiles(a: Mapping[str, Any], b: Mapping[str, Any], *, max_slowdown: float) -> Comparison:
    """Compare two profiles as `read_profile` gives them; b is the newer one.

    A figure is a regression when b is more than `max_slowdown` (0.05: 5 %) above a, and b's lower quartile over rounds
    lies above a's upper one; without quartiles the bound alone decides. Ratios of two precisions are not judged: each
    is to a `full` of its own. Profiles that do not say whether their run was stable are taken to be.
    """
    both = [name for name in a["strategies"] if name in b["strategies"]]
    rows = {name: (a["strategies"][name], b["strategies"][name]) for name in both}
    differences = _differences(a, b)
    unstable = {side: reasons for side, profile in (("a", a), ("b", b)) if (reasons := _reasons(profile))}
    judged = [figure for figure in _JUDGED if figure != "ratio_to_full" or "precision" not in differences]
    if _beside(differences) or unstable:
        judged = []
    return Comparison(
        strategies={
            name: {figure: _change(figure, mine, other) for figure in _FIGURES} for name, (mine, other) in rows.items()
        },
        only_in_a=tuple(name for name in a["strategies"] if name not in b["strategies"]),
        only_in_b=tuple(name for name in b["strategies"] if name not in a["strategies"]),
        differences=differences,
        unstable=unstable,
        regressions={
            name: tuple(figure for figure in judged if _is_slower(figure, mine, other, max_slowdown))
            for name, (mine, other) in rows.items()
        },
        max_slowdown=max_slowdown,
    )


def _beside(differences: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the differences beside which figures cannot be compared."""
    return tuple(name for name in differences if name in (*_SETTINGS, *_CONTENTS, *_MACHINE))


def _reasons(profile: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(map(str, profile.get("unstable") or ()))


def _change(figure: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Change:
    return Change(a=_figure(a, figure), b=_figure(b, figure))


def _figure(row: Mapping[str, Any], figure: str) -> float | None:
    value: Any = row
    for key in _FIGURES[figure]:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if _is_number(value) else None


def _is_slower(figure: str, a: Mapping[str, Any], b: Mapping[str, Any], max_slowdown: float) -> bool:
    slowdown = _change(figure, a, b).relative
    if slowdown is None or slowdown <= max_slowdown:
        return False
    spread_a, spread_b = _quartiles(a, figure), _quartiles(b, figure)
    return spread_a is None or spread_b is None or spread_b[0] > spread_a[1]


def _quartiles(row: Mapping[str, Any], figure: str) -> tuple[float, float] | None:
    match row.get(_JUDGED[figure]):
        case [low, high] if _is_number(low) and _is_number(high):
            return float(low), float(high)
    return None


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (a.get(name), b.get(name)) for name in (*_SETTINGS, *_CHOICES)}
    pairs |= {name: (_first_of(a, keys), _first_of(b, keys)) for name, keys in _CONTENTS.items()}
    pairs |= {name: (a["environment"].get(name), b["environment"].get(name)) for name in (*_MACHINE, *_VERSIONS)}
    return {name: (mine, other) for name, (mine, other) in pairs.items() if mine != other}


def _first_of(profile: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the first of these that a profile has, or None."""
    return next((profile[key] for key in keys if profile.get(key) is not None), None)


def _problem(data: Any) -> str | None:
    """Say what keeps parsed JSON from being a profile, or None."""
    if not isinstance(data, dict):
        return f"it holds a {type(data).__name__}, expected an object"
    for key in ("strategies", "environment"):
        if not isinstance(data.get(key), dict):
            return f"it has no object {key!r}"
    if not isinstance(data.get("unstable", []), list):
        return f"'unstable' is {data['unstable']!r}, expected a list of reasons"
    if not data["strategies"]:
        return "it has no strategies"
    for name, row in data["strategies"].items():
        for figure in ("median_ms", "ratio_to_full"):
            value = _figure(row, figure) if isinstance(row, dict) else None
            if value is None or value <= 0:
                return f"strategy {name!r} has no positive number {'.'.join(_FIGURES[figure])}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

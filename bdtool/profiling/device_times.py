"""Where a request's time goes on a GPU: copies, compute, enqueueing; and trtexec's warnings about it.

Source of names, warnings and thresholds: TensorRT, samples/common/sampleReporting.cpp, printEpilog.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bdtool.profiling.statistics import UNSTABLE_ABOVE, pooled_variation

Name = Literal["h2d", "compute", "d2h", "enqueue", "host"]
NAMES: tuple[Name, ...] = ("h2d", "compute", "d2h", "enqueue", "host")
ENQUEUE_BOUND_ABOVE = 0.8  # of the compute time
COPY_BOUND_FROM = 1.0  # of the compute time
THRESHOLDS = {
    "enqueue_to_compute": ENQUEUE_BOUND_ABOVE,
    "h2d_to_compute": COPY_BOUND_FROM,
    "d2h_to_compute": COPY_BOUND_FROM,
    "compute_coefficient_of_variation": UNSTABLE_ABOVE,
}
_NEXT_STEP = {
    "h2d": "pass images that are on the GPU already (`runtime.run` takes them), or larger batches",
    "d2h": "run larger batches, or a strategy that reads nothing back before the logits (--strategy graph)",
}
_COPY = {"h2d": "host-to-device copies of the images", "d2h": "device-to-host copies of keep bits and logits"}


@dataclass(kw_only=True)
class DeviceTimes:
    """Milliseconds of each request, by events on the device's stream; `enqueue` and `host` by the host's clock.

    `compute` is the engine calls or graph launches; where the device waits within one for the host to enqueue the
    next kernel, that wait is part of it. `host` is the whole request, from the images to the logits.
    """

    requests: dict[Name, list[float]] = field(default_factory=lambda: {name: [] for name in NAMES})
    _open: dict[Name, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))

    def add(self, name: Name, ms: float) -> None:
        """Count a part of the request that is under way."""
        self._open[name] += ms

    def close_request(self) -> None:
        """End the request that is under way and begin the next."""
        for name in NAMES:
            self.requests[name].append(self._open[name])
        self.clear_request()

    def clear_request(self) -> None:
        """Forget what was counted since the last request was closed."""
        self._open = dict.fromkeys(NAMES, 0.0)

    def median_ms(self, name: Name) -> float:
        return float(np.median(self.requests[name]))

    def compute_variation(self, blocks_run: np.ndarray) -> float:
        """Return the coefficient of variation of the compute time of equal work; blocks_run is float [requests]."""
        return pooled_variation(np.array(self.requests["compute"]), blocks_run)

    def to_json(self, blocks_run: np.ndarray) -> dict[str, Any]:
        variation = self.compute_variation(blocks_run)
        return {
            **{
                f"{name}_ms": {
                    "min": min(times),
                    "mean": float(np.mean(times)),
                    "median": self.median_ms(name),
                    "max": max(times),
                }
                for name, times in self.requests.items()
            },
            "compute_coefficient_of_variation": None if np.isnan(variation) else variation,
        }


def device_warnings(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return trtexec's warnings for each strategy, given its `DeviceTimes.to_json`; each says what to do next."""
    return [warning for name, row in rows.items() for warning in _warnings(name, row)]


def _warnings(name: str, row: Mapping[str, Any]) -> list[str]:
    compute = row["compute_ms"]["median"]
    found = []
    if row["enqueue_ms"]["median"] > ENQUEUE_BOUND_ABOVE * compute:
        found.append(
            f"{name}: throughput may be bound by enqueue time, {_against(row, 'enqueue', compute)} (above "
            f"{ENQUEUE_BOUND_ABOVE:g} of it the GPU may be under-utilized). Launch less: --strategy graph, CUDA graphs "
            "left on, or larger batches"
        )
    found += [
        f"{name}: throughput may be bound by {_COPY[copy]}, {_against(row, copy, compute)} (from "
        f"{COPY_BOUND_FROM:g} of it the GPU may be under-utilized): {_NEXT_STEP[copy]}"
        for copy in ("h2d", "d2h")
        if row[f"{copy}_ms"]["median"] >= COPY_BOUND_FROM * compute
    ]
    variation = row["compute_coefficient_of_variation"]
    if variation is not None and variation > UNSTABLE_ABOVE:
        found.append(
            f"{name}: GPU compute time is unstable, its coefficient of variation {variation:.1%} is above "
            f"{UNSTABLE_ABOVE:.1%}. Lock the clock with `nvidia-smi --lock-gpu-clocks`, and let nothing else run there"
        )
    return found


def _against(row: Mapping[str, Any], name: str, compute_ms: float) -> str:
    return f"{row[f'{name}_ms']['median']:.3f} ms against {compute_ms:.3f} ms of GPU compute"

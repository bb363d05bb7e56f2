"""Where a request's time goes. A pass of its own, because the clock reads around each engine call cost time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bdtool.profiling.device_times import DeviceTimes
from bdtool.profiling.workload import Run, Workload, runner
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from bdtool.specs import PartSpec
from engines.base import Call

PASS_NOTE = (
    "means of a pass of its own, with clock reads around each engine call, which slow it a little; dispatch is what "
    "no engine call and no preprocessing accounts for, the clock reads included"
)
DEVICE_NOTE = (
    "engine calls are timed by events on the device's stream: where the device waits for the host to enqueue the next "
    "call, that wait is part of them; so are the copies to the device (h2d) and back (d2h)"
)
_REQUESTS = 60  # of one image; fewer of larger batches
_MIN_REQUESTS = 8
_FEWEST_REQUESTS = 3  # where the duration holds no more
# A path, a fused or a full engine is one call for all that it joins.
_COMPONENTS = {"policy": "policy", "stem": "stem", "block": "blocks", "shortcut": "blocks", "head": "head"}
_ONE_ENGINE = "one_engine"


@dataclass(kw_only=True)
class PartTime:
    """Engine calls of one part over the measured requests."""

    part: PartSpec
    calls_ms: list[float] = field(default_factory=list)
    enqueue_ms: list[float] = field(default_factory=list)  # of the host, where a call only enqueues

    @property
    def total_ms(self) -> float:
        return sum(self.calls_ms)


@dataclass(kw_only=True)
class InstrumentedPass:
    """What the clocks showed."""

    batch: int
    times: dict[str, PartTime] = field(default_factory=dict)
    total_ms: list[float] = field(default_factory=list)  # of each request
    preprocess_ms: float = 0.0
    keep: list[np.ndarray] = field(default_factory=list)
    device: DeviceTimes | None = None  # where calls only enqueue

    @property
    def n_images(self) -> int:
        return len(self.total_ms) * self.batch

    def forget_warm_up(self) -> None:
        """Drop the times of the requests so far, which bound and warmed what the counted ones need."""
        for entry in self.times.values():
            entry.calls_ms.clear()
            entry.enqueue_ms.clear()
        if self.device is not None:
            self.device.clear_request()

    def split(self) -> dict[str, Any]:
        """Return mean milliseconds an image and shares of the whole; they add up to `total_ms` and to 1."""
        spent = {"preprocess": self.preprocess_ms}
        for entry in self.times.values():
            if entry.calls_ms:
                component = _COMPONENTS.get(entry.part.kind, _ONE_ENGINE)
                spent[component] = spent.get(component, 0.0) + entry.total_ms
        if self.device is not None:
            spent |= {"h2d": sum(self.device.requests["h2d"]), "d2h": sum(self.device.requests["d2h"])}
        whole = sum(self.total_ms)
        spent["dispatch"] = whole - sum(spent.values())
        per_image = np.array(self.total_ms) / self.batch
        return {
            "components": {
                name: {"ms": value / self.n_images, "share": value / whole} for name, value in spent.items()
            },
            "total_ms": float(per_image.mean()),
            "total_ms_iqr": [float(np.percentile(per_image, p)) for p in (25, 75)],
            "n_images": self.n_images,
            "device": None if self.device is None else self.device.to_json(self._blocks_run()),
        }

    def _blocks_run(self) -> np.ndarray:
        return np.array([keep.sum(axis=1).mean() for keep in self.keep])

    def parts(self) -> list[dict[str, Any]]:
        """Return one row for each part that ran.

        mean_ms of a call, its quartiles call_ms_iqr, ms_per_image over all images, calls of each request, usage (share
        of images whose bits want it), share of all engine time, FLOPs of one image; where calls only enqueue, their
        times are the device's, and enqueue_ms is the host's mean for a call, else None. In a batch of images with
        different bits a call runs on those images that the strategy hands to it, so that mean_ms is not for one image.
        """
        kept = np.concatenate(self.keep).mean(axis=0)
        shares = {"block": kept, "shortcut": 1 - kept}
        whole = sum(entry.total_ms for entry in self.times.values())
        return [
            {
                "name": entry.part.name,
                "kind": entry.part.kind,
                "mean_ms": entry.total_ms / len(entry.calls_ms),
                "call_ms_iqr": [float(np.percentile(entry.calls_ms, p)) for p in (25, 75)],
                "ms_per_image": entry.total_ms / self.n_images,
                "calls": len(entry.calls_ms) / len(self.total_ms),
                "usage": float(shares[entry.part.kind][entry.part.index or 0]) if entry.part.kind in shares else 1.0,
                "share": entry.total_ms / whole,
                "flops": entry.part.flops,
                "enqueue_ms": float(np.mean(entry.enqueue_ms)) if entry.enqueue_ms else None,
            }
            for entry in self.times.values()
            if entry.calls_ms
        ]


def run_instrumented(
    name: str,
    runtime: Orchestrator,
    workload: Workload,
    *,
    batch: int = 1,
    duration_s: float = 3,
    paths: PathOptions | None = None,
) -> InstrumentedPass:
    """Run some requests with a clock around preprocessing and around each engine call of a strategy.

    Args:
        duration_s: of all of it; three requests are run and counted, however long they take.
        paths: of a `path` strategy: the engines to join for this pass.
    """
    timer = runtime.device_timer
    device = None if timer is None else DeviceTimes()
    seen = InstrumentedPass(batch=batch, device=device)

    def wrap(part: PartSpec, call: Call) -> Call:
        entry = seen.times.setdefault(part.name, PartTime(part=part))
        if timer is None or device is None:
            return _clocked(call, entry.calls_ms.append)

        def on_enqueue(ms: float) -> None:
            entry.enqueue_ms.append(ms)
            device.add("enqueue", ms)

        def on_compute(ms: float) -> None:
            entry.calls_ms.append(ms)
            device.add("compute", ms)

        return timer.timed(_clocked(call, on_enqueue), on_compute)

    with runtime.timed(wrap, paths=paths) as other:
        run = runner(name, other)
        n_requests = _warm_up(run, workload, batch, limit_s=duration_s / 2)
        if timer is not None:
            timer.collect()
        seen.forget_warm_up()
        with nullcontext() if timer is None or device is None else timer.timing_copies(device.add):
            for i in range(n_requests):
                images, keep = workload.request(i, batch)
                start = time.perf_counter()
                prepared = other.prepare(images)  # here, so that it can be timed: `run` takes it as it is
                middle = time.perf_counter()
                result = run(prepared, keep)
                seen.total_ms.append((time.perf_counter() - start) * 1000)
                seen.preprocess_ms += (middle - start) * 1000
                seen.keep.append(result.policy)
                if timer is not None and device is not None:
                    timer.collect()
                    device.add("host", seen.total_ms[-1])
                    device.close_request()
    return seen


def _warm_up(run: Run, workload: Workload, batch: int, *, limit_s: float) -> int:
    """Bind and warm what the counted requests need: run them uncounted. Return how many there are within the limit."""
    stop = time.perf_counter() + limit_s
    most = max(_MIN_REQUESTS, _REQUESTS // batch)
    for i in range(most):
        if i >= _FEWEST_REQUESTS and time.perf_counter() >= stop:
            return i
        run(*workload.request(i, batch))
    return most


def _clocked(call: Call, on_ms: Callable[[float], None]) -> Call:
    """Return `call` between two looks at the host's clock."""

    def clocked() -> None:
        start = time.perf_counter()
        call()
        on_ms((time.perf_counter() - start) * 1000)

    return clocked

"""What `bdtool profile` found, and its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bdtool.profiling.device_times import THRESHOLDS
from bdtool.profiling.instrumented import DEVICE_NOTE, PASS_NOTE
from bdtool.profiling.line import BlocksLine
from bdtool.profiling.stability import find_instability
from bdtool.profiling.statistics import Samples
from bdtool.profiling.workload import BASELINE, BOUNDARY, Settings, contender_of
from bdtool.runtime.recommendation import Recommendation
from engines.graph_modes import GraphChoice

MEMORY_NOTE = "largest resident size of the process up to the end of the latency rounds, all strategies open together"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One run's figures and everything that names them."""

    bundle: str
    arch: str
    policy: str
    policy_network: str
    precision: str
    settings: Settings
    n_images: int
    input_source: str
    is_real_input: bool
    images_sha256: str  # of the timed images
    keep_sha256: str | None  # of their keep bits; None where the policy network decides
    weights_sha256: str  # of the MODEL that the bundle was exported from
    samples: dict[str, Samples]
    parts: list[dict[str, Any]]
    warnings: list[str]
    environment: dict[str, str | int | float]
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: dict[str, BlocksLine] = field(default_factory=dict)
    sweep: dict[int, dict[str, Samples]] = field(default_factory=dict)  # by batch
    paths: dict[str, dict[str, Any]] = field(default_factory=dict)  # what path caches held, by strategy
    graphs: dict[str, GraphChoice] = field(default_factory=dict)  # how strategies use CUDA graphs, on a GPU
    peak_memory_mib: float | None = None
    recommendation: Recommendation | None = None
    is_recorded: bool = False  # so that strategy `auto` takes it

    @property
    def unstable(self) -> list[str]:
        """Why the ratios are not to be trusted; [] where they are."""
        return find_instability(self.samples)

    @property
    def pass_note(self) -> str:
        """How the split and the parts were timed."""
        on_device = any(part["enqueue_ms"] is not None for part in self.parts)
        return f"{PASS_NOTE}; {DEVICE_NOTE}" if on_device else PASS_NOTE

    def to_json(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "bundle": self.bundle,
            "arch": self.arch,
            "policy": self.policy,
            "policy_network": self.policy_network,
            "precision": self.precision,
            "batch": settings.batch,
            "warmup_ms": settings.warmup_ms,
            "duration_s": settings.duration_s,
            "boundary": BOUNDARY,
            "n_images": self.n_images,
            "input_source": self.input_source,
            "is_real_input": self.is_real_input,
            "images_sha256": self.images_sha256,
            "keep_sha256": self.keep_sha256,
            "weights_sha256": self.weights_sha256,
            "strategies": self._with_precisions(_strategies_json(self.samples, settings, self.paths, self.graphs)),
            "split": {
                "pass": self.pass_note,
                "unit": "ms an image",
                "strategies": self.splits,
                "device_unit": "ms a request",
                "device_thresholds": THRESHOLDS,
            },
            "latency_against_blocks": {name: asdict(line) for name, line in self.lines.items()},
            "sweep": {str(batch): _strategies_json(found, settings, {}, {}) for batch, found in self.sweep.items()},
            "parts": self.parts,
            "parts_pass": f"engine calls of chain at batch {settings.batch}; {self.pass_note}",
            "peak_memory_mib": self.peak_memory_mib,
            "peak_memory_boundary": MEMORY_NOTE,
            "unstable": self.unstable,
            "recommendation": None if self.recommendation is None else asdict(self.recommendation),
            "recommendation_recorded": self.is_recorded,
            "warnings": self.warnings,
            "environment": self.environment,
        }

    def _with_precisions(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {name: row | {"precision": contender_of(name).precision or self.precision} for name, row in rows.items()}


def _strategies_json(
    samples: dict[str, Samples], settings: Settings, paths: dict[str, dict[str, Any]], graphs: dict[str, GraphChoice]
) -> dict[str, Any]:
    full = samples[BASELINE]
    rows = {name: one.to_json(full, settings.percentiles) for name, one in samples.items()}
    for name, one in samples.items():
        if one.hits is not None:  # of masks that have an engine, or a graph
            rows[name]["hit_rate"] = one.hit_rate
    for name, held in paths.items():
        rows[name] |= held
    for name, choice in graphs.items():
        rows[name]["cuda_graph"] = asdict(choice)
    return rows

"""Mixed precision: what each block costs in int8, alone, and the greedy choice; the table goes into the bundle."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bdtool.calibrating.calibration_set import PathStatistics
from bdtool.calibrating.gates import Gates, Reference
from bdtool.calibrating.trial import Trial
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.specs import PartSpec
from calibration.cache import ResultCache, content_key
from calibration.mixed import BlockSensitivity, Choice, choose_precisions
from calibration.timing import times_in_turns
from engines.base import Call, Engine
from engines.registry import identify_backend, open_backend
from export.bundle import Bundle
from export.files import sha256_of_bytes

_LOWER = "int8"
TABLE, PLOT = "calibration/mixed.json", "calibration/mixed.svg"


def mixed_models(
    bundle: Bundle,
    models: Mapping[str, bytes],
    reference: Reference,
    trial: Trial,
    statistics: PathStatistics,
    work: Path,
    *,
    on_progress: Callable[[str, float], None],
) -> tuple[dict[str, bytes], dict[str, Any], dict[str, bytes]]:
    """Return the int8 models of the blocks chosen, figures for the manifest, and the table and plot for the bundle.

    Args:
        reference, trial: of the images to choose on; those that the choice is reported for are others.
        models: the int8 model of each block, with float32 activations, so that each can be exchanged alone.
        statistics: what `models` came from.
        work: directory for what was measured before an interruption.
    """
    bench = _Bench(models, reference, trial, max_batch=bundle.manifest.max_batch)
    cache = ResultCache(work / f"sensitivity-{bench.key(bundle, statistics)}.json")
    rows = []
    for i, name in enumerate(sorted(models)):
        figures = cache.get(name, lambda name=name: bench.sensitivity(name))  # type: ignore[misc]
        rows.append(BlockSensitivity(block=name, precision=_LOWER, **figures, **bench.timing(name)))
        on_progress(f"sensitivity of {name}", (i + 1) / len(models))
    choice = choose_precisions(rows, bench.drop, max_accuracy_drop=trial.max_accuracy_drop)
    table = _table(rows, choice, trial)
    sidecars = {TABLE: (json.dumps(table, indent=2) + "\n").encode(), PLOT: sensitivity_plot(rows, choice).encode()}
    extra = {
        "table": TABLE,
        "plot": PLOT,
        "chosen": dict(choice.precisions),
        "chosen_on": {"n_images": trial.evaluation.n_images, "input_source": trial.evaluation.description},
        "not_faster": list(choice.not_faster),
    }
    return {name: models[name] for name in choice.precisions}, extra, sidecars


class _Bench:
    """Runs the fp32 chain with some of its blocks exchanged."""

    def __init__(self, models: Mapping[str, bytes], reference: Reference, trial: Trial, *, max_batch: int) -> None:
        self._models, self._reference, self._trial, self._max_batch = models, reference, trial, max_batch
        self._fp32 = reference.fp32
        self._backend = open_backend("onnxruntime", "cpu", threads=trial.threads)
        self._engines: dict[str, Engine] = {}

    def key(self, bundle: Bundle, statistics: PathStatistics) -> str:
        return content_key(
            data=statistics.source.digest,
            fp32={part.name: bundle.part_sha256(part) for part in bundle.network.parts},
            models={name: sha256_of_bytes(model) for name, model in self._models.items()},
            evaluation=self._trial.digest(),
            backend=asdict(identify_backend("onnxruntime", "cpu")),
            threads=self._backend.threads,
            format=4,
        )

    def sensitivity(self, name: str) -> dict[str, Any]:
        """Measure what one block alone in int8 does to the network."""
        gates = self._measure({name: _LOWER})
        return {
            "accuracy_drop": gates.accuracy_drop or 0.0,
            "changed_classes": gates.changed_classes,
            "policy_flips": gates.policy_flips,
            "logits_error": gates.logits_error,
        }

    def timing(self, name: str) -> dict[str, Any]:
        """Time one block in int8 against fp32, anew in each run: the machine may have been busy in an earlier one."""
        part = self._fp32.network.part(name)
        rounds = times_in_turns(self._call(part, self._fp32.engine(part)), self._call(part, self._engine(name)))
        ratios = rounds[:, 1] / rounds[:, 0]
        return {
            "fp32_ms": float(np.median(rounds[:, 0])),
            "ratio_to_fp32": float(np.median(ratios)),
            "ratio_to_fp32_iqr": np.percentile(ratios, (25, 75)).tolist(),
        }

    def drop(self, chosen: Mapping[str, str]) -> float:
        return self._measure(chosen).accuracy_drop or 0.0

    def _measure(self, chosen: Mapping[str, str]) -> Gates:
        network = self._fp32.network
        parts = [part for part in network.parts if part.kind != "full"]
        engines = {p.name: self._engine(p.name) if p.name in chosen else self._fp32.engine(p) for p in parts}
        with Orchestrator(network, self._backend, engines, strategy="chain", max_batch=self._max_batch) as other:
            return self._trial.measure(self._reference, other)

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            part = self._fp32.network.part(name)
            layout = self._fp32.engine(part).layout  # they exchange activations with the fp32 ones
            built = self._backend.build(part, self._models[name], layout=layout)
            self._engines[name] = self._backend.load(part, built.data, layout=built.layout)
        return self._engines[name]

    def _call(self, part: PartSpec, engine: Engine) -> Call:
        inputs = {t.name: self._backend.allocate(t.shape_for(1), t.dtype) for t in part.inputs}
        outputs = {t.name: self._backend.allocate(t.shape_for(1), t.dtype) for t in part.outputs}
        return engine.bind(inputs, outputs)


def _table(rows: Sequence[BlockSensitivity], choice: Choice, trial: Trial) -> dict[str, Any]:
    return {
        "input_source": trial.evaluation.description,
        "n_images": trial.evaluation.n_images,
        "max_accuracy_drop": trial.max_accuracy_drop,
        "accuracy_drop": choice.accuracy_drop,
        "blocks": [{**row.to_json(), "chosen": choice.precisions.get(row.block, "fp32")} for row in rows],
        "steps": [dict(step) for step in choice.steps],
    }


def sensitivity_plot(rows: Sequence[BlockSensitivity], choice: Choice) -> str:
    """Return an SVG: a bar for each block's logits error in int8, filled where int8 was chosen; saved ms beside it."""
    height, bar, left, width = 20, 14, 110, 420
    largest = max((row.logits_error for row in rows), default=0.0) or 1.0
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 260}" height="{height * len(rows) + 50}" '
        'font-family="sans-serif" font-size="12">',
        '<text x="10" y="18">Error of the logits with one block in int8 (filled: chosen), and time saved</text>',
    ]
    for i, row in enumerate(rows):
        y = 34 + i * height
        length = width * row.logits_error / largest
        fill = "#4269d0" if row.block in choice.precisions else "none"
        label = f"{100 * row.logits_error:.2f} %, {1e3 * row.saved_ms:+.0f} us"
        label += "" if row.is_faster else ", not measurably faster"
        lines += [
            f'<text x="10" y="{y + 11}">{html.escape(row.block)}</text>',
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar}" fill="{fill}" stroke="#4269d0"/>',
            f'<text x="{left + length + 6:.1f}" y="{y + 11}">{label}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"

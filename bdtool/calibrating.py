"""A bundle gains another precision: ranges along the policy's paths, parts, gates, and only then the bundle changes."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bdtool.data.batches import ImageSource
from bdtool.errors import CalibrationError, EngineError
from bdtool.evaluation import keep_for
from bdtool.gates import Gates, measure_gates
from bdtool.runtime.factory import parts_for
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import parse_policy
from bdtool.runtime.preprocess import preprocess
from bdtool.specs import PartSpec
from bdtool.version import version
from calibration.cache import collect_ranges, content_key
from calibration.part_errors import part_errors
from calibration.paths import PathBatch, PathWalker, TopUp, WatchedPart, part_ranges
from calibration.quantize import quantize_part
from calibration.ranges import DEFAULT_PERCENTILE, RangeCollector
from calibration.variant import PartModel, commit_candidate, stage_candidate, with_calibration
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle
from export.check import Comparison
from export.files import exclusive_lock
from export.half import half_from_fp32
from export.half_spec import HALF_DTYPES
from export.onnx_precision import precision_of

logger = logging.getLogger(__name__)
PRECISIONS = ("int8", "fp16", "bf16", "mixed")
DEFAULT_LIMIT = 512
DEFAULT_MAX_ACCURACY_DROP = 0.5  # percentage points
DEFAULT_AT_LEAST = 64  # images for each part: a choice; below some dozen a range is luck
_BATCH = 64
_N_COMPARED = 32  # images on whose paths single parts are compared
_FLOAT_KINDS = ("policy", "head")  # stay fp32 unless asked


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What `bdtool calibrate` was asked for."""

    precision: str = "int8"
    policy: str | None = None  # a POLICY; None is the policy network, or `all` where there is none
    limit: int = DEFAULT_LIMIT  # calibration images
    seed: int = 0  # draws them
    method: str = "min-max"
    percentile: float = DEFAULT_PERCENTILE
    at_least: int = DEFAULT_AT_LEAST
    include: frozenset[str] = frozenset()  # of "policy", "head": quantize these, too
    max_accuracy_drop: float = DEFAULT_MAX_ACCURACY_DROP
    eval_limit: int | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What came out. Where `ok` is False, the bundle is as it was."""

    precision: str
    gates: Gates
    part_errors: Mapping[str, Comparison]
    topped_up: Mapping[str, int]  # images that ran a part for its statistics only
    n_images: int
    input_source: str
    obtained: Mapping[str, str]  # precision by part name
    extra: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        return self.gates.ok and all(one.ok for one in self.part_errors.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "ok": self.ok,
            "images": self.n_images,
            "input_source": self.input_source,
            "topped_up": dict(self.topped_up),
            "obtained": dict(self.obtained),
            "part_errors": {name: asdict(one) | {"ok": one.ok} for name, one in self.part_errors.items()},
            "gates": self.gates.to_json(),
            **self.extra,
        }


@dataclass(frozen=True, kw_only=True)
class PathStatistics:
    """The calibration images' keep bits, and the ranges along their paths."""

    keep: np.ndarray  # bool [n_images, K]
    digest: str  # of images and keep bits
    top_up: TopUp
    parts: Mapping[str, WatchedPart]
    collector: RangeCollector


def calibrate(
    bundle: Bundle,
    data: ImageSource,
    evaluation: ImageSource,
    request: CalibrationRequest,
    *,
    on_progress: Callable[[str, float], None] = lambda step, share: None,
) -> Calibrated:
    """Add parts of another precision to the bundle, unless they miss a gate.

    Args:
        data: calibration images; `request.limit` of them are drawn.
        evaluation: images for the gates, labelled where the accuracy is to be bounded.
        on_progress: called with the name of a step and the share of it that is done, 0 to 1.

    Raises:
        CalibrationError: the images are not real ones, or an activation is not finite.
        PolicyError: the policy does not fit.
        BundleError: another calibration of the bundle is running, or it cannot be written.
    """
    if not data.is_real or not evaluation.is_real:
        made_up = evaluation if data.is_real else data
        raise CalibrationError(
            f"calibration needs real images: {made_up.description}. Give the ones the network will see with --data"
        )
    work = bundle.path.resolve().with_name(f".{bundle.path.resolve().name}.calibration")
    work.mkdir(exist_ok=True)
    with (
        exclusive_lock(work / "lock", purpose=f"a calibration of {bundle.path}"),
        tempfile.TemporaryDirectory(prefix="candidate-", dir=work) as staging,
    ):
        return _Calibration(bundle, data, evaluation, request, work, Path(staging), on_progress).run()


class _Calibration:
    def __init__(
        self,
        bundle: Bundle,
        data: ImageSource,
        evaluation: ImageSource,
        request: CalibrationRequest,
        work: Path,
        staging: Path,
        on_progress: Callable[[str, float], None],
    ) -> None:
        self.bundle, self.evaluation, self.request, self.work, self.staging = bundle, evaluation, request, work, staging
        network = bundle.network
        self.images = drawn(data, request.limit, seed=request.seed)
        self.policy = parse_policy(request.policy, n_blocks=network.n_blocks, has_policy_network=network.has_policy)
        self.on_progress = on_progress

    def run(self) -> Calibrated:
        precision = self.request.precision
        with self._open(self.bundle, "fp32") as fp32:
            keep, digest = self._decide(fp32)
            top_up = TopUp.plan(self.bundle.network, keep, at_least=self.request.at_least)
            extra: Mapping[str, Any] = {}
            sidecars: Mapping[str, bytes] = {}
            if precision in HALF_DTYPES:
                activation, data = HALF_DTYPES[precision], self._half_models(precision)
                top_up = TopUp(rows={})
            else:
                statistics = self._statistics(keep, digest, top_up)
                if precision == "mixed":
                    from bdtool.sensitivity import mixed_models

                    activation = "float32"
                    data, extra, sidecars = mixed_models(self, fp32, statistics)
                else:
                    activation = "int8"
                    data = self.quantized_models(statistics, integer_activations=True)
            return self._finish(fp32, activation, data, keep, digest, top_up, extra, sidecars)

    def quantized_models(self, statistics: PathStatistics, *, integer_activations: bool) -> dict[str, bytes]:
        """Return the INT8 models by part name; a part that stays fp32 is there only where it must take integers."""
        models = {}
        for part in self.bundle.network.parts:
            if part.kind == "full" or (part.kind == "policy" and "policy" not in self.request.include):
                continue
            keeps_float = part.kind in _FLOAT_KINDS and part.kind not in self.request.include
            if keeps_float and not integer_activations:
                continue
            ranges = part_ranges(
                self.bundle.network,
                statistics.parts[part.name],
                statistics.collector,
                method=self.request.method,
                percentile=self.request.percentile,
            )
            models[part.name] = quantize_part(
                self._fp32(part), part, ranges, integer_activations=integer_activations, weights=not keeps_float
            )
        return models

    def _fp32(self, part: PartSpec) -> bytes:
        return self.bundle.part_path(part).read_bytes()

    def _half_models(self, precision: str) -> dict[str, bytes]:
        parts = [part for part in self.bundle.network.parts if part.kind not in ("full", "policy")]
        return {part.name: half_from_fp32(self._fp32(part), part, precision) for part in parts}

    def _decide(self, fp32: Orchestrator) -> tuple[np.ndarray, str]:
        """Return the keep bits of the calibration images, and a digest of the images and the bits."""
        digest = hashlib.sha256()
        rows = []
        first = 0
        for batch in self.images.batches(_BATCH):
            keep = keep_for(self.policy, len(batch.images), first)
            if keep is None:
                keep = fp32.keep_probability(batch.images) >= self.bundle.network.threshold
            rows.append(keep)
            digest.update(batch.images.tobytes())
            digest.update(keep.tobytes())
            first += len(batch.images)
        return np.concatenate(rows), digest.hexdigest()

    def _statistics(self, keep: np.ndarray, digest: str, top_up: TopUp) -> PathStatistics:
        network = self.bundle.network
        watched = [part for part in network.parts if part.kind != "full"]
        parts = {part.name: WatchedPart(self._fp32(part), part) for part in watched}
        key = content_key(
            data=digest,
            parts=[self.bundle.part_sha256(part) for part in watched],
            preprocessing=asdict(network.preprocessing),
            at_least=self.request.at_least,
            onnxruntime=_library_version(),
            format=1,
        )
        done = 0

        def on_batch(n_images: int) -> None:
            nonlocal done
            done += n_images
            self.on_progress("collecting ranges", done / len(keep))

        walker = PathWalker(network, parts, top_up)
        file = self.work / f"ranges-{key}.npz"
        collector = collect_ranges(walker, self.path_batches(keep), file, on_batch=on_batch)
        return PathStatistics(keep=keep, digest=digest, top_up=top_up, parts=parts, collector=collector)

    def path_batches(self, keep: np.ndarray) -> Iterator[PathBatch]:
        first = 0
        for batch in self.images.batches(_BATCH):
            bits = keep[first : first + len(batch.images)]
            yield PathBatch(first=first, images=preprocess(batch.images, self.bundle.network.preprocessing), keep=bits)
            first += len(batch.images)

    def _finish(
        self,
        fp32: Orchestrator,
        activation: str,
        data: Mapping[str, bytes],
        keep: np.ndarray,
        digest: str,
        top_up: TopUp,
        extra: Mapping[str, Any],
        sidecars: Mapping[str, bytes],
    ) -> Calibrated:
        """Compare the parts, measure the gates, and put the candidate into the bundle where it passes."""
        precision = self.request.precision
        errors = self._part_errors(activation, data, keep)
        models = {
            part.name: PartModel(precision="fp32", data=None)
            for part in self.bundle.network.parts
            if part.kind != "full"
        } | {name: self._part_model(name, model, errors[name]) for name, model in data.items()}
        candidate = stage_candidate(self.bundle, precision, activation, models, self.staging)
        gates = self._gates(fp32, candidate, errors)
        files = candidate.files_at(precision)
        result = Calibrated(
            precision=precision,
            gates=gates,
            part_errors=errors,
            topped_up={name: len(rows) for name, rows in top_up.rows.items()},
            n_images=len(keep),
            input_source=self.images.description,
            obtained={name: file.precision for name, file in files.items()},
            extra=extra,
        )
        if result.ok:
            record = {
                **{key: value for key, value in result.to_json().items() if key not in ("part_errors", "obtained")},
                "policy": self.policy.name,
                "data_sha256": digest,
                "method": self.request.method,
                "percentile": self.request.percentile if self.request.method == "percentile" else None,
                "seed": self.request.seed,
                "at_least": self.request.at_least,
                "calibrated_by": f"bdtool {version()}, onnxruntime {_library_version()}",
            }
            commit_candidate(with_calibration(candidate, precision, record, self.staging), precision, sidecars)
            self._keep_engines(precision)
        return result

    def _part_model(self, name: str, data: bytes, error: Comparison) -> PartModel:
        kind = self.bundle.network.part(name).kind
        keeps_float = kind in _FLOAT_KINDS and kind not in self.request.include  # whatever type its input has
        obtained = "fp32" if keeps_float else precision_of(onnx.ModelProto.FromString(data))
        return PartModel(precision=obtained, data=data, error=error.error, tolerance=error.tolerance)

    def _part_errors(self, activation: str, data: Mapping[str, bytes], keep: np.ndarray) -> dict[str, Comparison]:
        first = next(self.path_batches(keep))
        few = replace(first, images=first.images[:_N_COMPARED], keep=first.keep[:_N_COMPARED])
        return part_errors(self.bundle.network.with_activation(activation), self._fp32, data, few)

    def _gates(self, fp32: Orchestrator, candidate: Bundle, errors: Mapping[str, Comparison]) -> Gates:
        empty = Gates(
            policy=self.policy.name,
            n_images=0,
            input_source=self.evaluation.description,
            logits_error=None,
            logits_worst=None,
            changed_classes=None,
            policy_flips=None,
            accuracy_fp32=None,
            accuracy=None,
            max_accuracy_drop=self.request.max_accuracy_drop,
        )
        if self.request.precision == "bf16" or not all(one.ok for one in errors.values()):
            return empty  # no CPU engine computes in bfloat16; and a part that is wrong needs no figures of the whole
        with self._open(candidate, self.request.precision) as other:
            return self.measure(fp32, other)

    def measure(self, fp32: Orchestrator, other: Orchestrator) -> Gates:
        """Measure the gates of any engines against fp32."""
        total = min(self.request.eval_limit or self.evaluation.n_images, self.evaluation.n_images)
        done = 0

        def on_batch(n_images: int) -> None:
            nonlocal done
            done += n_images
            self.on_progress("measuring", done / total)

        return measure_gates(
            fp32,
            other,
            self.evaluation,
            self.policy,
            limit=self.request.eval_limit,
            max_accuracy_drop=self.request.max_accuracy_drop,
            on_batch=on_batch,
        )

    @contextmanager
    def _open(self, bundle: Bundle, precision: str) -> Iterator[Orchestrator]:
        """Open the chain with the bundle's engines, or with some built outside it: a bundle stays as it was."""
        identity = identify_backend("onnxruntime", "cpu")
        library = open_backend("onnxruntime", "cpu", threads=self.request.threads)
        network = bundle.network_at(precision)
        parts = parts_for("chain", network)
        store = EngineStore(bundle, identity, precision=precision)
        records = store.find(parts)
        if len(records) < len(parts):
            store = EngineStore(bundle, identity, precision=precision, directory=self.staging / "engines")
            failed = [status for status in store.build(lambda: library) if status.status == "failed"]
            if failed:
                raise EngineError(f"{len(failed)} {precision} engines did not build; the first: {failed[0].message}")
            records = store.find(parts)
        engines = store.load(library, records)
        with Orchestrator(network, library, engines, strategy="chain", max_batch=bundle.manifest.max_batch) as runtime:
            yield runtime

    def _keep_engines(self, precision: str) -> None:
        """Take the candidate's engines along: their records say what they were built from, and they fit."""
        for directory in (self.staging / "engines").glob(f"*-{precision}"):
            shutil.copytree(directory, self.bundle.engines_path / directory.name, dirs_exist_ok=True)


def _library_version() -> str:
    return identify_backend("onnxruntime", "cpu").version


def drawn(data: ImageSource, limit: int, *, seed: int) -> ImageSource:
    """Return `limit` images drawn without repetition, in the set's order: folders list one class after another."""
    if limit >= data.n_images:
        return data
    rows = np.sort(np.random.default_rng(seed).choice(data.n_images, size=limit, replace=False))
    return ImageSource(
        description=f"{limit} of {data.description} (seed {seed})",
        is_real=data.is_real,
        names=[data.names[row] for row in rows],
        labels=None if data.labels is None else data.labels[rows],
        image_at=lambda index: data.image_at(int(rows[index])),
    )

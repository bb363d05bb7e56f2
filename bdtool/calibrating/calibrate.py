"""A bundle gains another precision: ranges along the policy's paths, parts, gates, and only then the bundle changes."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from bdtool.calibrating.calibration_set import CalibrationSet, PathStatistics, collect_statistics
from bdtool.calibrating.gates import Gates, Reference
from bdtool.calibrating.judged_images import LEAST_HELD_OUT, halves, held_out
from bdtool.calibrating.request import CalibrationRequest
from bdtool.calibrating.trial import Trial
from bdtool.data.batches import ImageSource
from bdtool.errors import BundleError, CalibrationError, PolicyError, UsageError
from bdtool.runtime.policies import PolicyRequest, parse_policy_for
from bdtool.runtime.read_only import is_read_only
from bdtool.runtime.thresholds import threshold_of
from bdtool.specs import PartSpec
from bdtool.version import version
from calibration.bias_correction import correct_biases, n_images_for_correction
from calibration.part_errors import part_errors
from calibration.paths import TopUp, part_ranges
from calibration.quantize import quantize_part
from calibration.variant import PartModel, commit_candidate, stage_candidate, with_calibration
from engines.registry import identify_backend
from export.bundle import Bundle
from export.check import Comparison
from export.files import advice_on, exclusive_lock, remove_leftovers
from export.half import half_from_fp32
from export.half_spec import HALF_DTYPES
from export.onnx_precision import precision_of

logger = logging.getLogger(__name__)
_N_COMPARED = 32  # images on whose paths single parts are compared
_STAGING = "candidate-"  # what directories of parts on trial begin with
_FLOAT_KINDS = ("policy", "head")  # stay fp32 unless asked
_FILES = ("table", "plot")  # in `extra`: the bundle has them where it took the parts
_NOT_RECORDED = ("part_errors", "obtained", "replaced")  # in the manifest: its parts say it, or it is gone


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
    evaluated_on_calibration_images: bool = False  # the gates were measured on some of them, for want of others
    has_one_path: bool = False  # the policy keeps the same blocks of every image
    replaced: str | None = None  # the policy of earlier parts of this precision, whose place these take where `ok`

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
            "evaluated_on_calibration_images": self.evaluated_on_calibration_images,
            "replaced": self.replaced if self.ok else None,
            **self.extra,
            **({} if self.ok else {name: None for name in _FILES if name in self.extra}),
        }


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Models of another precision by part name; a part without one stays as it was exported."""

    activation: str  # dtype of the activation between parts
    models: Mapping[str, bytes]
    extra: Mapping[str, Any] = field(default_factory=dict)  # figures for the manifest
    sidecars: Mapping[str, bytes] = field(default_factory=dict)  # other files, by their path in the bundle


def calibrate(
    bundle: Bundle,
    data: ImageSource,
    evaluation: ImageSource,
    request: CalibrationRequest,
    *,
    on_start: Callable[[bool], None] = lambda evaluates_on_calibration_images: None,
    on_progress: Callable[[str, float], None] = lambda step, share: None,
) -> Calibrated:
    """Add parts of another precision to the bundle, unless they miss a gate.

    Args:
        data: calibration images; `request.limit` of them are drawn.
        evaluation: images for the gates, labelled where the accuracy is to be bounded. Where it is the set of `data`,
            those calibrated on are left out, if `LEAST_HELD_OUT` others remain; of mixed precision twice as many, which
            are halved: one half is to choose on.
        on_start: called once, before the first image is read, with whether gates are to be measured on images that
            are calibrated on, for want of others.
        on_progress: called with the name of a step and the share of it that is done, 0 to 1.

    Raises:
        CalibrationError: the images are not real ones, or too few to be halved, or an activation is not finite.
        UsageError: `include` with another precision than int8.
        PolicyError: the policy does not fit, or holds a row for each image of one data set.
        BundleError: another calibration of the bundle is running, or it cannot be written.
    """
    if not data.is_real or not evaluation.is_real:
        made_up = evaluation if data.is_real else data
        raise CalibrationError(
            f"calibration needs real images: {made_up.description}. Give the ones the network will see with --data"
        )
    if request.include and request.precision != "int8":
        raise UsageError(
            f"--include {sorted(request.include)[0]} adds a part to --precision int8, and {request.precision} was "
            "asked for. Leave it out"
        )
    bundle = bundle.with_threshold(threshold_of(request.policy))
    network = bundle.network
    policy = parse_policy_for(network, request.policy)
    if policy.n_rows is not None:
        raise PolicyError(
            f"policy {policy.name}: has a row for each of {policy.n_rows} images, but calibration draws images and is "
            f"judged on others. Give a file with one row [{network.n_blocks}] for all, or another POLICY"
        )
    if is_read_only(bundle.path):  # before minutes of work for it
        raise BundleError(
            f"{bundle.path} is read-only, and its {request.precision} parts would have no place. Make it writable, or "
            "calibrate a copy"
        )
    work = _workplace(bundle)
    with exclusive_lock(work / "lock", purpose=f"a calibration of {bundle.path}"):
        for left in work.glob(f"{_STAGING}*"):  # by calibrations that were killed, as none other is at work
            shutil.rmtree(left, ignore_errors=True)
        remove_leftovers(work)
        try:
            with tempfile.TemporaryDirectory(prefix=_STAGING, dir=work) as staging:
                calibration = _Calibration(bundle, data, evaluation, policy, request, work, Path(staging), on_progress)
                on_start(calibration.learns_from_judged())
                return calibration.run()
        except OSError as exc:
            if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise BundleError(
                f"{work}: what the calibration measures cannot be written ({exc.strerror or exc}). {bundle.path} is as "
                f"it was; {advice_on(exc)} and run the same command again"
            ) from exc


def _workplace(bundle: Bundle) -> Path:
    """Make the directory beside the bundle that holds what a calibration has measured, and return it.

    Raises:
        BundleError: it cannot be made, or nothing be written beside the bundle, as the lock of a change has to be.
    """
    place = bundle.path.resolve()
    work = place.with_name(f".{place.name}.calibration")
    try:
        if not os.access(place.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        work.mkdir(exist_ok=True)
    except OSError as exc:
        raise BundleError(
            f"{place.parent}: a calibration keeps what it has measured there, in {work.name}, which cannot be written "
            f"({exc.strerror or exc}). Make that directory writable, or calibrate a copy of the bundle in another one"
        ) from exc
    return work


class _Calibration:
    def __init__(
        self,
        bundle: Bundle,
        data: ImageSource,
        evaluation: ImageSource,
        policy: PolicyRequest,
        request: CalibrationRequest,
        work: Path,
        staging: Path,
        on_progress: Callable[[str, float], None],
    ) -> None:
        self._bundle, self._request, self._work, self._staging = bundle, request, work, staging
        self._images = data.drawn(request.limit, seed=request.seed)
        self._policy = policy
        self._on_progress = on_progress
        is_mixed = request.precision == "mixed"
        if request.precision not in HALF_DTYPES:
            at_least = 2 * LEAST_HELD_OUT if is_mixed else LEAST_HELD_OUT
            evaluation = held_out(evaluation, self._images, at_least=at_least)
        judged = evaluation.drawn(request.eval_limit)
        if is_mixed:
            judged, self._choosing_images = halves(judged)
        self._trial = Trial(
            evaluation=judged,
            policy=self._policy,
            max_accuracy_drop=request.max_accuracy_drop,
            threads=request.threads,
            engines=staging / "engines",
            on_share=lambda share: on_progress("measuring", share),
        )

    def learns_from_judged(self) -> bool:
        """Say whether images of the gates give ranges or biases; FP16 and BF16 parts learn from none."""
        shared = self._trial.evaluation.shared_with(self._images)
        return self._request.precision not in HALF_DTYPES and bool(shared.any())

    def run(self) -> Calibrated:
        with self._trial.open(self._bundle, "fp32") as fp32:
            reference = self._trial.reference(fp32)
            source = CalibrationSet.decide(self._images, self._policy, fp32)
            if self._request.precision in HALF_DTYPES:
                return self._finish(reference, self._half_candidates(), source, TopUp(rows={}))
            top_up = TopUp.plan(self._bundle.network, source.keep, at_least=self._request.at_least)
            statistics = collect_statistics(
                self._bundle,
                source,
                top_up,
                self._work,
                on_share=lambda share: self._on_progress("collecting ranges", share),
            )
            if self._request.precision == "mixed":
                return self._finish(reference, self._mixed_candidates(reference, statistics), source, top_up)
            models = self._quantized_models(statistics, integer_activations=True)
            return self._finish(reference, Candidates(activation="int8", models=models), source, top_up)

    def _quantized_models(self, statistics: PathStatistics, *, integer_activations: bool) -> dict[str, bytes]:
        """Return the INT8 models by part name; a part that stays fp32 is there only where it must take integers."""
        models = {}
        for part in self._bundle.network.parts:
            if part.kind == "full" or (part.kind == "policy" and "policy" not in self._request.include):
                continue
            keeps_float = self._keeps_float(part)
            if keeps_float and not integer_activations:
                continue
            ranges = part_ranges(
                self._bundle.network,
                statistics.parts[part.name],
                statistics.collector,
                method=self._request.method,
                percentile=self._request.percentile,
            )
            models[part.name] = quantize_part(
                self._fp32(part), part, ranges, integer_activations=integer_activations, weights=not keeps_float
            )
        if not self._request.bias_correction:
            return models
        return self._with_corrected_biases(models, statistics.source, chained=integer_activations)

    def _with_corrected_biases(
        self, models: Mapping[str, bytes], source: CalibrationSet, *, chained: bool
    ) -> dict[str, bytes]:
        network = self._bundle.network
        n_parts = sum(part.kind != "full" for part in network.parts)
        return correct_biases(
            network,
            self._fp32,
            models,
            source.spread(n_images_for_correction(network)),
            at_least=self._request.at_least,
            chained=chained,
            on_part=lambda n_done: self._on_progress("correcting biases", n_done / n_parts),
        )

    def _half_candidates(self) -> Candidates:
        precision = self._request.precision
        parts = [part for part in self._bundle.network.parts if part.kind not in ("full", "policy")]
        models = {part.name: half_from_fp32(self._fp32(part), part, precision) for part in parts}
        return Candidates(activation=HALF_DTYPES[precision], models=models)

    def _mixed_candidates(self, reference: Reference, statistics: PathStatistics) -> Candidates:
        """Let each block take the precision that pays; the activation stays float32, so that they can differ."""
        from bdtool.calibrating.sensitivity import mixed_models

        blocks = {part.name for part in self._bundle.network.blocks}
        models = self._quantized_models(statistics, integer_activations=False)
        trial = replace(self._trial, evaluation=self._choosing_images)
        chosen, extra, sidecars = mixed_models(
            self._bundle,
            {name: model for name, model in models.items() if name in blocks},
            trial.reference(reference.fp32),
            trial,
            statistics,
            self._work,
            on_progress=self._on_progress,
        )
        return Candidates(activation="float32", models=chosen, extra=extra, sidecars=sidecars)

    def _finish(self, reference: Reference, made: Candidates, source: CalibrationSet, top_up: TopUp) -> Calibrated:
        """Compare the parts, measure the gates, and put the candidate into the bundle where it passes."""
        precision = self._request.precision
        earlier = self._bundle.manifest.variants.get(precision)
        errors = self._part_errors(made, source)
        candidate = stage_candidate(
            self._bundle, precision, made.activation, self._part_models(made, errors), self._staging
        )
        gates = self._gates(reference, candidate, errors)
        result = Calibrated(
            precision=precision,
            gates=gates,
            part_errors=errors,
            topped_up={name: len(rows) for name, rows in top_up.rows.items()},
            n_images=len(source.keep),
            input_source=self._images.description,
            obtained={name: file.precision for name, file in candidate.files_at(precision).items()},
            extra=made.extra,
            evaluated_on_calibration_images=gates.n_images > 0 and self.learns_from_judged(),
            has_one_path=not self._policy.is_learned and bool((source.keep == source.keep[0]).all()),
            replaced=None if earlier is None else str(earlier.calibration.get("policy", "unknown")),
        )
        if result.ok:
            record = self._record(result, source)
            finished = with_calibration(candidate, precision, record, self._staging)
            commit_candidate(finished, precision, made.sidecars)
            self._keep_engines(precision)
        return result

    def _keep_engines(self, precision: str) -> None:
        """Put the engines of the measurement into the bundle, whose parts are there by now: they can be built again."""
        try:
            self._trial.keep_engines(self._bundle, precision)
        except OSError as exc:
            reason = exc.strerror or exc
            logger.warning("%s: its %s engines could not be kept (%s)", self._bundle.path, precision, reason)

    def _record(self, result: Calibrated, source: CalibrationSet) -> dict[str, Any]:
        """Return what the manifest says of the calibration."""
        request = self._request
        return {
            **{key: value for key, value in result.to_json().items() if key not in _NOT_RECORDED},
            "policy": self._policy.name,
            "data_sha256": source.digest,
            "method": request.method,
            "percentile": request.percentile if request.method == "percentile" else None,
            "bias_correction": request.bias_correction,
            "seed": request.seed,
            "at_least": request.at_least,
            "calibrated_by": f"bdtool {version()}, onnxruntime {identify_backend('onnxruntime', 'cpu').version}",
        }

    def _part_models(self, made: Candidates, errors: Mapping[str, Comparison]) -> dict[str, PartModel]:
        """Return every part but `full`, with the precision it was given."""
        parts = [part for part in self._bundle.network.parts if part.kind != "full"]
        return {part.name: self._part_model(part, made.models.get(part.name), errors) for part in parts}

    def _part_model(self, part: PartSpec, data: bytes | None, errors: Mapping[str, Comparison]) -> PartModel:
        if data is None:
            return PartModel(precision="fp32", data=None)
        # a part that keeps its weights is fp32, whatever type its input has
        obtained = "fp32" if self._keeps_float(part) else precision_of(onnx.ModelProto.FromString(data))
        error = errors[part.name]
        return PartModel(precision=obtained, data=data, error=error.error, tolerance=error.tolerance)

    def _part_errors(self, made: Candidates, source: CalibrationSet) -> dict[str, Comparison]:
        network = self._bundle.network.with_activation(made.activation)
        return part_errors(network, self._fp32, made.models, source.spread(_N_COMPARED))

    def _gates(self, reference: Reference, candidate: Bundle, errors: Mapping[str, Comparison]) -> Gates:
        precision = self._request.precision
        if precision == "bf16" or not all(one.ok for one in errors.values()):
            # no CPU engine computes in bfloat16; and a part that is wrong needs no figures of the whole
            return self._trial.unmeasured()
        with self._trial.open(candidate, precision) as other:
            return self._trial.measure(reference, other)

    def _keeps_float(self, part: PartSpec) -> bool:
        return part.kind in _FLOAT_KINDS and part.kind not in self._request.include

    def _fp32(self, part: PartSpec) -> bytes:
        return self._bundle.part_bytes(part)

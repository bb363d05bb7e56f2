"""Comparing parts and answers of a lower precision with the oracle's: what is far, and what was to be expected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bdtool.calibrating.request import CalibrationRequest
from bdtool.errors import BundleError
from bdtool.specs import NetworkSpec, PartSpec
from bdtool.words import percent
from calibration.walk import RunPart, everyone_where_nobody, walk_paths
from export.bundle import Bundle
from export.check import Probe
from export.manifest import EXPORTED, Variant
from export.part_source import PartSource

# Root mean square of the logits' difference over that of the logits. Bounds against gross mistakes, as those of parts:
# the accuracy is what counts. int8 measured 5 to 8 % on a ResNet-32, fp16 0.1 %.
LOGITS_BOUNDS = {"int8": 0.25, "mixed": 0.25, "fp16": 0.02, "bf16": 0.1}
CHANGED_BOUNDS = {"int8": 0.15, "mixed": 0.15, "fp16": 0.03, "bf16": 0.05}  # share of images whose class changes
_POINTS = 100


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What parts of a lower precision are judged by.

    Attributes:
        policy: a POLICY, along whose paths they are compared; None: the policy network, or every block without one.
        policy_flips: share of keep bits that flip by rounding; None where the policy network is the fp32 one.
        max_accuracy_drop: percentage points.
    """

    policy: str | None = None
    policy_flips: float | None = None
    max_accuracy_drop: float = CalibrationRequest.max_accuracy_drop


def terms_of(bundle: Bundle, source: PartSource) -> Terms:
    """Return the terms that calibration noted; of parts that were never calibrated, its defaults.

    Raises:
        BundleError: the manifest's record of the calibration was changed, so that it names none.
    """
    if source.converted:
        return Terms()
    try:
        return _noted_terms(bundle.manifest.variants[source.precision], bundle.network.find("policy"))
    except (KeyError, TypeError, ValueError) as exc:
        raise BundleError(
            f"{bundle.path}: the manifest's record of the {source.precision} calibration was changed "
            f"({type(exc).__name__}: {exc}), expected a policy, and gates with max_accuracy_drop and policy_flips. "
            f"Make the parts anew: bdtool calibrate --precision {source.precision}"
        ) from exc


def _noted_terms(variant: Variant, policy: PartSpec | None) -> Terms:
    gates, text = variant.calibration["gates"], variant.calibration["policy"]
    if not isinstance(text, str):
        raise TypeError(f"policy is {text!r}")
    keeps_policy = policy is None or variant.files[policy.name].precision == EXPORTED
    return Terms(
        policy=text,  # its ranges hold for the paths of this one
        policy_flips=None if keeps_policy else float(gates["policy_flips"]),
        max_accuracy_drop=float(gates["max_accuracy_drop"]),
    )


def path_probes(run_part: RunPart, network: NetworkSpec, pixels: np.ndarray, keep: np.ndarray) -> list[Probe]:
    """Return a probe of each part along the paths that a precision is judged on: calibrated ranges hold for no other.

    A part that no image keeps is probed on all of them, and `full` has but the one path.

    Args:
        run_part: what the oracle makes of float32 values.
        pixels: preprocessed float32 [n, 3, H, W].
        keep: bool [n, K].
    """
    probes = {}

    def run(part: PartSpec, values: np.ndarray) -> np.ndarray:
        result = run_part(part, values)
        probes[part.name] = _probe(part, values, result)
        return result

    full = network.require("full")
    logits = walk_paths(network, pixels, np.ones_like(keep), run)
    walk_paths(network, pixels, keep, run, extra=everyone_where_nobody(keep))
    return [*probes.values(), _probe(full, pixels, logits)]


def _probe(part: PartSpec, values: np.ndarray, result: np.ndarray) -> Probe:
    return Probe(part=part, feeds={part.inputs[0].name: values}, expected={part.outputs[0].name: result})


def lower_outputs(
    expected: np.ndarray,
    actual: np.ndarray,
    labels: np.ndarray | None,
    *,
    precision: str,
    max_accuracy_drop: float,
    oracle: str,
) -> list[tuple[str, float | None, float, str]]:
    """Return name, figure, bound and detail of the rungs logits, top1 and accuracy.

    A few hundred images say little about an accuracy: its bound is the calibration's, in percentage points, and two
    standard errors of the difference, which the images whose class changes make up.

    Args:
        expected, actual: logits float32 [N, classes] of the oracle and of the engines, on equal keep bits.
        labels: int64 [N], or None.
    """
    changed = float((actual.argmax(axis=1) != expected.argmax(axis=1)).mean())
    rows: list[tuple[str, float | None, float, str]] = [
        (
            "logits",
            logits_error(expected, actual),
            LOGITS_BOUNDS[precision],
            f"largest difference {np.abs(actual - expected).max():.2g}",
        ),
        ("top1", changed, CHANGED_BOUNDS[precision], f"{percent(changed, 2)} of the predictions change"),
    ]
    if labels is None:
        return [*rows, ("accuracy", None, max_accuracy_drop, "the images have no labels")]
    before, after = float((expected.argmax(axis=1) == labels).mean()), float((actual.argmax(axis=1) == labels).mean())
    noise = 2 * math.sqrt(changed / len(labels)) * _POINTS
    detail = f"{percent(after, 2)}, {oracle} {percent(before, 2)}; bound {max_accuracy_drop:g} points and noise"
    return [*rows, ("accuracy", max(0.0, _POINTS * (before - after)), max_accuracy_drop + noise, detail)]


def logits_error(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return the root mean square of the difference over that of the expected logits; both float32 [N, classes]."""
    return math.sqrt(float(((actual - expected) ** 2).mean()) / max(float((expected**2).mean()), 1e-30))


def flips_bound(measured: float, n_bits: int) -> float:
    """Return the share of `n_bits` keep bits that may flip: what calibration measured, and two standard errors."""
    return measured + 2 * math.sqrt((measured + 1 / n_bits) / n_bits)  # of at least one bit

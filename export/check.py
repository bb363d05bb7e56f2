"""Does an ONNX part compute what its PyTorch module computes? Measured on real-range inputs, per precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from bdtool.errors import ExportError
from bdtool.specs import PartSpec
from export.manifest import EXPORTED
from export.ort_threads import any_threads_options

# Worst |difference| over max(1, largest |expected|). fp32: both sides sum up to a few thousand float32 products in a
# different order, which leaves about 1e-6; Polygraphy's and Optimum's default is 1e-5 as well.
#
# The others are bounds against gross mistakes: a wrong scale, a lost ReLU. How much accuracy a precision costs is for
# calibration's gates to measure. fp16 has 11 bits, bf16 has 8; int8 has 7 and a sign.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.25}
# Share of the values that counts. The largest ones saturate in int8, and shall: the range that rounds the others best
# may end at half of the largest.
SHARES: Mapping[str, float] = {"fp32": 1.0, "fp16": 1.0, "bf16": 1.0, "int8": 0.999}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The worst error of one tensor: max |actual - expected| / max(1, max |expected|), and its bound."""

    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    @property
    def share_of_bound(self) -> float:
        """error / tolerance, above 1 where it is not ok: tells which of parts with bounds of their own is worst."""
        if math.isnan(self.error) or self.tolerance == 0:
            return 0.0 if self.ok else math.inf
        return self.error / self.tolerance


def compare(expected: np.ndarray, actual: np.ndarray, *, tolerance: float, share: float = 1.0) -> Comparison:
    """Compare two arrays; a different shape or a value that is not finite counts as an infinite error.

    `share` is the share of the values that counts, the worst ones left out: of integers, some may saturate.
    """
    expected, actual = _plain(expected), _plain(actual)
    if expected.shape != actual.shape or not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        return Comparison(error=float("inf"), tolerance=tolerance)
    if expected.dtype.kind == "i":  # quantized: the range is what the integers can say, however small these are
        scale = float(np.iinfo(expected.dtype).max)
    else:
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    differences = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    worst = float(differences.max(initial=0.0) if share == 1.0 else np.quantile(differences, share))
    return Comparison(error=worst / scale, tolerance=tolerance)


def compare_outputs(
    expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], *, tolerance: float, share: float = 1.0
) -> Comparison:
    """Return the worst comparison of a part's outputs, which are arrays by tensor name."""
    results = [compare(values, actual[name], tolerance=tolerance, share=share) for name, values in expected.items()]
    return max(results, key=lambda result: result.error)


def _plain(values: np.ndarray) -> np.ndarray:
    """Return floats as float32 or wider, and integers as they are."""
    return values if values.dtype.kind == "i" or values.dtype.itemsize >= 4 else values.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A part, inputs that occur in the network, and what it should make of them; arrays by tensor name."""

    part: PartSpec
    feeds: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]


class OnnxReference:
    """An ONNX model run by ONNX Runtime with every graph optimisation off: what the file itself says."""

    def __init__(self, model: bytes) -> None:
        options = any_threads_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))


def check_part(
    name: str, model: bytes, feeds: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> Comparison:
    """Return the worst comparison of an exported part's outputs.

    Raises:
        ExportError: an output differs by more than the tolerance of the precision `EXPORTED`, or is not finite.
    """
    worst = compare_outputs(expected, OnnxReference(model).run(feeds), tolerance=TOLERANCES[EXPORTED])
    if not worst.ok:
        raise ExportError(
            f"part {name!r}: its ONNX differs from PyTorch by {worst.error:.2g} of the output's range, {EXPORTED} "
            f"allows {worst.tolerance:.0e}. Check the weights for very large or non-finite values"
        )
    return worst

"""Does an ONNX part compute what its PyTorch module computes? Measured on real-range inputs, per precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from bdtool.errors import ExportError
from export.ort_threads import any_threads_options

# Worst |difference| over max(1, largest |expected|). fp32: both sides sum up to a few thousand float32 products in a
# different order, which leaves about 1e-6; Polygraphy's and Optimum's default is 1e-5 as well.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-5}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The worst error of one tensor: max |actual - expected| / max(1, max |expected|), and its bound."""

    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def compare(expected: np.ndarray, actual: np.ndarray, *, tolerance: float) -> Comparison:
    """Compare two arrays; a different shape or a value that is not finite counts as an infinite error."""
    if expected.shape != actual.shape or not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        return Comparison(error=float("inf"), tolerance=tolerance)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    worst = float(np.abs(actual.astype(np.float64) - expected).max(initial=0.0))
    return Comparison(error=worst / scale, tolerance=tolerance)


def compare_outputs(
    expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], *, tolerance: float
) -> Comparison:
    """Return the worst comparison of a part's outputs, which are arrays by tensor name."""
    results = [compare(values, actual[name], tolerance=tolerance) for name, values in expected.items()]
    return max(results, key=lambda result: result.error)


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
    name: str, model: bytes, feeds: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], *, precision: str
) -> Comparison:
    """Return the worst comparison of a part's outputs.

    Raises:
        ExportError: an output differs by more than the precision's tolerance, or is not finite.
    """
    worst = compare_outputs(expected, OnnxReference(model).run(feeds), tolerance=TOLERANCES[precision])
    if not worst.ok:
        raise ExportError(
            f"part {name!r}: its ONNX differs from PyTorch by {worst.error:.2g} of the output's range, {precision} "
            f"allows {worst.tolerance:.0e}. Check the weights for very large or non-finite values"
        )
    return worst

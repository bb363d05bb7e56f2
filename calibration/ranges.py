"""Ranges of activations from streamed values: histograms of bounded size, then one largest value for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnxruntime.quantization.calibrate import HistogramCollector

from bdtool.errors import CalibrationError
from calibration.methods import DEFAULT_PERCENTILE, METHODS

N_BINS = 2048  # over both signs, as TensorRT's calibrators had
_N_LEVELS = 128  # of the int8 magnitudes that entropy compares with
# A range below this counts as 0: its step of int8 would be subnormal, which some kernels flush to 0.
_SMALLEST = float(np.finfo(np.float32).tiny) * _N_LEVELS
_MSE_SHARES = np.linspace(0.2, 1, 161)  # of the largest value: steps of half a percent of it


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """What is kept of a tensor's values: counts between -limit and limit, and how many images they came from."""

    counts: np.ndarray  # int64 [n_bins]
    limit: float  # the largest absolute value seen
    lowest: float
    highest: float
    n_images: int


class RangeCollector:
    """Histograms by key, which grow with the values; memory does not depend on how many there are."""

    def __init__(self) -> None:
        self._histograms: dict[str, Histogram] = {}

    def add(self, key: str, values: np.ndarray) -> None:
        """Count float32 values [N, ...] of N images under `key`.

        Raises:
            CalibrationError: a value is not finite.
        """
        largest = float(np.abs(values).max(initial=0.0))
        if not np.isfinite(largest):
            raise CalibrationError(f"activation {key!r} is not finite on a calibration image; check the weights")
        if largest < _SMALLEST:
            largest = 0.0
        before = self._histograms.get(key)
        limit = max(largest, before.limit if before else 0.0)
        span = limit or 1.0  # of zeros alone, or as good as
        counts, _ = np.histogram(values, N_BINS, range=(-span, span))
        lowest, highest = float(values.min(initial=0.0)), float(values.max(initial=0.0))
        n_images = len(values)
        if before is not None:
            counts = counts + _rescaled(before, limit)
            lowest, highest = min(lowest, before.lowest), max(highest, before.highest)
            n_images += before.n_images
        self._histograms[key] = Histogram(counts=counts, limit=limit, lowest=lowest, highest=highest, n_images=n_images)

    def n_images(self, key: str) -> int:
        return self._histograms[key].n_images if key in self._histograms else 0

    def histogram(self, key: str) -> Histogram:
        return self._histograms[key]

    def range_of(self, key: str, *, method: str, percentile: float = DEFAULT_PERCENTILE) -> float:
        """Return the largest absolute value that int8 is to represent; larger ones will saturate.

        Args:
            method: "min-max" takes the largest seen, "percentile" the one that this share (in %) of the absolute values
                does not exceed, "entropy" the one of least KL divergence (Migacz, "8-bit Inference with TensorRT", GTC
                2017, as onnxruntime.quantization computes it), "mse" the one of least mean square error of rounding and
                saturation (Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1).

        Raises:
            CalibrationError: no value was counted.
            ValueError: an unknown method.
        """
        if key not in self._histograms:
            raise CalibrationError(f"no value of {key!r} was seen; give more images")
        one = self._histograms[key]
        if one.limit == 0:  # a unit that never fires: any scale represents 0
            return 1.0
        if method == "min-max":
            return one.limit
        if method == "percentile":
            return _percentile(one, percentile)
        if method == "entropy":
            return _entropy(one)
        if method == "mse":
            return _least_square_error(one)
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything collected as arrays by name, for a file."""
        rows: dict[str, np.ndarray] = {}
        for key, one in self._histograms.items():
            rows[f"{key}/counts"] = one.counts
            rows[f"{key}/figures"] = np.array([one.limit, one.lowest, one.highest, one.n_images], dtype=np.float64)
        return rows

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> RangeCollector:
        """Undo `arrays`."""
        collector = cls()
        for name in arrays:
            key, _, kind = name.rpartition("/")
            if kind == "counts":
                limit, lowest, highest, n_images = arrays[f"{key}/figures"]
                collector._histograms[key] = Histogram(
                    counts=arrays[name],
                    limit=float(limit),
                    lowest=float(lowest),
                    highest=float(highest),
                    n_images=int(n_images),
                )
        return collector


def _rescaled(one: Histogram, limit: float) -> np.ndarray:
    """Return the counts in as many bins over a larger range: each old bin goes where its centre lies."""
    if limit == one.limit:
        return one.counts
    centres = (np.arange(N_BINS) + 0.5) / N_BINS * 2 - 1
    places = ((centres * (one.limit / limit) + 1) / 2 * N_BINS).astype(np.int64)
    counts = np.zeros(N_BINS, dtype=np.int64)
    np.add.at(counts, places, one.counts)
    return counts


def _percentile(one: Histogram, percentile: float) -> float:
    half = N_BINS // 2
    absolute = one.counts[half:] + one.counts[:half][::-1]
    covered = np.cumsum(absolute) / absolute.sum()
    index = int(np.searchsorted(covered, percentile / 100))
    return min(one.limit, (index + 1) / half * one.limit)


def _entropy(one: Histogram) -> float:
    edges = np.linspace(-one.limit, one.limit, N_BINS + 1, dtype=np.float32)
    lowest, highest = np.float32(one.lowest), np.float32(one.highest)
    collector = HistogramCollector("entropy", True, N_BINS, _N_LEVELS, None, None)
    low, high = collector.get_entropy_threshold((one.counts, edges, lowest, highest), _N_LEVELS)
    return float(max(abs(low), abs(high)))


def _least_square_error(one: Histogram) -> float:
    """Return the best of some shares of the largest value, each value standing where the centre of its bin lies."""
    magnitudes = np.abs((np.arange(N_BINS) + 0.5) / N_BINS * 2 - 1)
    best = (np.inf, one.limit)
    for share in _MSE_SHARES:
        scale = share / (_N_LEVELS - 1)
        rounded = np.minimum(np.rint(magnitudes / scale), _N_LEVELS - 1) * scale
        best = min(best, (float(one.counts @ (rounded - magnitudes) ** 2), float(share * one.limit)))
    return best[1]

"""A bundle's ONNX parts run one after another: what engines are compared with where PyTorch cannot be asked."""

from __future__ import annotations

from functools import cache

import numpy as np

from bdtool.runtime.preprocess import Preprocessor
from bdtool.runtime.result import RunResult, joined
from bdtool.specs import NetworkSpec, PartSpec
from calibration.part_errors import CandidatePart
from calibration.walk import walk_paths
from export.part_source import PartSource


class OnnxClassifier:
    """The stored parts of one precision, in ONNX Runtime without its graph optimisations; `run` as a `TorchClassifier`.

    Args:
        network: with the threshold that the keep bits are asked at.
        max_batch: images that run at once, which bounds the memory.
    """

    name = "ONNX"

    def __init__(self, network: NetworkSpec, source: PartSource, *, max_batch: int) -> None:
        self.network = network
        self.precision = source.precision
        self._source = source
        self._preprocess = Preprocessor(network.preprocessing)
        self._max_batch = max_batch
        self._part = cache(self._load)  # a session for each part, made when it first runs

    def run_part(self, part: PartSpec, values: np.ndarray) -> np.ndarray:
        """Return what a part makes of float32 values [n, ...], as float32."""
        return self._part(part.name).run(values)

    def keep_probability(self, images: np.ndarray) -> np.ndarray:
        """Return P(keep), float32 [N, K], for images as `Orchestrator.run` takes them."""
        policy = self.network.require("policy")
        return np.concatenate([self.run_part(policy, self._preprocess(images[rows])) for rows in self._slices(images)])

    def decide(self, images: np.ndarray) -> np.ndarray:
        """Return what the policy network keeps, bool [N, K]."""
        keep: np.ndarray = self.keep_probability(images) >= self.network.threshold
        return keep

    def run(self, images: np.ndarray, policy: np.ndarray) -> RunResult:
        """Classify images with keep bits, bool [N, K]."""
        return joined([self._run_slice(images[rows], policy[rows]) for rows in self._slices(images)])

    def _run_slice(self, images: np.ndarray, keep: np.ndarray) -> RunResult:
        def run(part: PartSpec, values: np.ndarray) -> np.ndarray:
            return values if part.kind == "policy" else self.run_part(part, values)  # the bits are there already

        return RunResult(logits=walk_paths(self.network, self._preprocess(images), keep, run), policy=keep)

    def _slices(self, images: np.ndarray) -> list[slice]:
        return [slice(start, start + self._max_batch) for start in range(0, len(images), self._max_batch)]

    def _load(self, name: str) -> CandidatePart:
        part = self._source.network.part(name)
        return CandidatePart(part, self._source.model(part))

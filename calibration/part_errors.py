"""How far each part of another precision is from its fp32 part, on the activations of real paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx

from bdtool.specs import NetworkSpec, PartSpec
from calibration.paths import PathBatch
from calibration.walk import everyone_where_nobody, walk_paths
from export.check import SHARES, TOLERANCES, Comparison, OnnxReference, compare
from export.onnx_precision import dequantized, float32_form, input_scale, output_scale, precision_of, quantized


class ComparedPart:
    """An fp32 part and its candidate; `model` None means that the candidate is the fp32 part itself."""

    def __init__(self, part: PartSpec, fp32: bytes, model: bytes | None) -> None:
        self.part = part
        self._fp32 = OnnxReference(fp32)
        self.candidate = None if model is None else CandidatePart(part, model)
        self.worst = Comparison(error=0.0, tolerance=0.0 if self.candidate is None else self.candidate.tolerance)

    def run(self, values: np.ndarray) -> np.ndarray:
        """Return what the fp32 part makes of float32 values [N, ...], and note how far the candidate is from it."""
        source, result = self.part.inputs[0].name, self.part.outputs[0].name
        expected = self._fp32.run({source: values})[result]
        if self.candidate is not None:
            compared = self.candidate.compare(expected, self.candidate.run(values))
            self.worst = max(self.worst, compared, key=lambda one: one.error)
        return expected


class CandidatePart:
    """A part of any precision that takes and gives float32."""

    def __init__(self, part: PartSpec, model: bytes) -> None:
        proto = onnx.ModelProto.FromString(model)
        self.precision = precision_of(proto)
        self.tolerance = TOLERANCES[self.precision]
        self._source, self._result = part.inputs[0].name, part.outputs[0].name
        self._scales = input_scale(proto, self._source), output_scale(proto, self._result)
        self._dtype = part.inputs[0].dtype
        if self.precision == "bf16":
            proto, self._dtype = float32_form(proto), "float32"
        self._session = OnnxReference(proto.SerializeToString())

    def feeds(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return float32 values as the part takes them."""
        return {self._source: quantized(values, self._scales[0], self._dtype)}

    def outputs(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return what the part's model makes of `feeds`."""
        return self._session.run(feeds)

    def floats(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the part's output as float32."""
        return dequantized(outputs[self._result], self._scales[1])

    def run(self, values: np.ndarray) -> np.ndarray:
        """Return what the part makes of float32 values, as float32."""
        return self.floats(self.outputs(self.feeds(values)))

    def compare(self, expected: np.ndarray, actual: np.ndarray, *, slack: float = 1.0) -> Comparison:
        """Compare what the part gave with what fp32 gives; the bound is that of its precision times `slack`."""
        return compare(expected, actual, tolerance=slack * self.tolerance, share=SHARES[self.precision])


def part_errors(
    network: NetworkSpec, fp32: Callable[[PartSpec], bytes], candidates: Mapping[str, bytes], batch: PathBatch
) -> dict[str, Comparison]:
    """Return the worst error of each candidate part on the fp32 activations of the batch's paths, by part name.

    A part that no image of the batch runs is compared on all of them.

    Args:
        network: in the candidates' dtypes.
        candidates: models by part name; parts without one are taken as they are.
    """
    parts = {p.name: ComparedPart(p, fp32(p), candidates.get(p.name)) for p in network.parts if p.kind != "full"}

    def run(part: PartSpec, values: np.ndarray) -> np.ndarray:
        return parts[part.name].run(values)

    walk_paths(network, batch.images, batch.keep, run, extra=everyone_where_nobody(batch.keep))
    return {name: one.worst for name, one in parts.items() if one.candidate is not None}

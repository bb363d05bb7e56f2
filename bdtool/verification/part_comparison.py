"""A part by itself: its ONNX against the oracle, and its engine against its ONNX, in any precision."""

from __future__ import annotations

import math

import numpy as np

from bdtool.errors import EngineError
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.padding import padded
from bdtool.specs import PIXELS
from calibration.part_errors import CandidatePart
from engines.base import ENGINE_BOUNDS
from engines.layouts import run_plain
from export.check import Comparison, Probe, compare_outputs
from export.part_source import PartSource


def compare_part(
    source: PartSource, probe: Probe, images: np.ndarray, runtime: Orchestrator
) -> tuple[Comparison, Comparison]:
    """Compare a part's ONNX with the oracle, on the activations of a probe, and its engine with its ONNX.

    Args:
        source: the ONNX parts that the engines of `runtime` were built from.
        images: uint8 [n, height, width, 3], of which the probe was made; engines that normalise them take these.
    """
    part = source.network.part(probe.part.name)
    candidate = CandidatePart(part, source.model(part))
    is_int8_network = part.kind == "full" and candidate.precision == "int8"
    feeds = candidate.feeds(probe.feeds[part.inputs[0].name])
    onnx = candidate.outputs(feeds)
    expected = probe.expected[part.outputs[0].name]
    against_oracle = candidate.compare(expected, candidate.floats(onnx), slack=1 + is_int8_network)
    bound = ENGINE_BOUNDS["int8 network" if is_int8_network else candidate.precision]
    engine = runtime.engine(part)
    given = {t.name: images if t.dtype == PIXELS else feeds[t.name] for t in engine.inputs}
    n_images = len(given[engine.inputs[0].name])  # of a block those that keep it
    taken = {name: padded(values, runtime.min_batch) for name, values in given.items()}
    try:
        outputs = {name: values[:n_images] for name, values in run_plain(engine, part, taken).items()}
    except EngineError:  # the engine of another part, for instance, refuses the shapes
        return against_oracle, Comparison(error=math.inf, tolerance=bound.tolerance)
    return against_oracle, compare_outputs(onnx, outputs, tolerance=bound.tolerance, share=bound.share)

"""A built engine against the ONNX part that it was built from, on made-up values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from bdtool.errors import EngineError
from bdtool.specs import PIXELS, PartSpec, TensorSpec
from engines.base import ENGINE_BOUNDS, Engine, EngineBound
from engines.layouts import run_plain
from export.check import OnnxReference, compare_outputs
from export.onnx_precision import precision_of, quantizing_scale

N_PROBES = 2  # images that an engine is compared on, where it takes as many


def check_engine(
    part: PartSpec,
    model: bytes,
    engine: Engine,
    *,
    n_images: int = N_PROBES,
    bounds: Mapping[str, EngineBound] = ENGINE_BOUNDS,
    failure: type[EngineError] = EngineError,
) -> float:
    """Return the engine's worst error on `n_images`, over the output's range.

    Raises:
        EngineError: it is beyond `bounds`, by the part's precision; raised as the class `failure`.
    """
    rng = np.random.default_rng(0)
    proto = onnx.ModelProto.FromString(model)
    feeds = {t.name: _probe_values(t, rng, quantizing_scale(proto, t.name), n_images=n_images) for t in part.inputs}
    expected = OnnxReference(model).run(feeds)
    actual = run_plain(engine, part, feeds)
    precision = precision_of(proto)
    bound = bounds["int8 network" if precision == "int8" and part.kind == "full" else precision]
    worst = compare_outputs(expected, actual, tolerance=bound.tolerance, share=bound.share)
    if not worst.ok:
        raise failure(
            f"part {part.name!r}: its engine differs from its ONNX by {worst.error:.2g} of the output's range, "
            f"allowed is {bound.tolerance}"
        )
    return worst.error


def _probe_values(
    tensor: TensorSpec, rng: np.random.Generator, scale: float | None = None, *, n_images: int = N_PROBES
) -> np.ndarray:
    """Return values to compare an engine with its part on; `scale` is that on which the part quantizes them, if any.

    Negative ones too, though most activations follow a ReLU: they show a ReLU that was cut off with a guard. Integers
    are as after a ReLU, few of them large: others would run out of the ranges inside.
    """
    if tensor.dtype == PIXELS:
        return rng.integers(0, 256, size=tensor.shape_for(n_images), dtype=np.uint8)
    values = rng.normal(size=tensor.shape_for(n_images))
    integers = np.clip(np.abs(8 * values).round(), 0, 127)
    if tensor.dtype == "int8":
        return integers.astype(np.int8)
    return (values if scale is None else integers * scale).astype(tensor.dtype)

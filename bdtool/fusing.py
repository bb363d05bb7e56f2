"""A bundle as one ONNX file, for deployments that can hold only one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from bdtool.data.synthetic import synthetic_images
from bdtool.errors import BundleError, ExportError, UsageError
from bdtool.runtime.paths import parts_of_path
from bdtool.runtime.policies import bits_of
from bdtool.runtime.preprocess import preprocess
from bdtool.specs import NetworkSpec, dict_from_preprocessing
from engines.base import ENGINE_BOUNDS
from engines.portable import IntegerForm, portable_part
from export.check import OnnxReference, compare_outputs
from export.compose import compose_parts
from export.files import write_output
from export.fused import fuse_parts
from export.fused_spec import FORCE_DROP, FORCE_KEEP
from export.part_source import PartSource

_N_MASKS = 4
_N_PICTURES = 2  # of one path: a batch


def write_fused(source: PartSource, path: Path, *, form: IntegerForm) -> float:
    """Fuse a bundle's parts into one ONNX file at `path`; return the worst error, over the range of what differs.

    The file is compared with its own parts, run one after another: on a picture for each of some random masks, every
    block and none, and on a picture whose blocks the policy network chooses. Parts that take another form for the file
    are compared with those of the bundle first, one by one.

    Args:
        form: of parts with integers.

    Raises:
        EngineError: a part computes something else in that form.
        ExportError: the fused model gives other logits, or keeps other blocks.
        UsageError: parts of bf16, which cannot be run here.
        BundleError: the file cannot be written.
    """
    network, tolerance = source.network, _tolerance(source.precision)
    taken = {part.name: portable_part(part, source.model(part), form) for part in network.parts if part.kind != "full"}
    pieces = {name: model for name, (model, _) in taken.items()}
    model = fuse_parts(network, pieces)
    check = _Check(network, OnnxReference(model), pieces, tolerance)
    errors = [check.error(mask, seed) for seed, mask in enumerate([*_masks(network.n_blocks), None])]
    _write(path, model, network, threshold=network.threshold)
    return max(*errors, *(error for _, error in taken.values()))


def write_path(source: PartSource, path: Path, mask: np.ndarray, *, form: IntegerForm) -> float:
    """Write the parts of one mask's path as one ONNX file at `path`, without `If`; return its error as `write_fused`.

    It takes batches. The file is compared with its own parts, run one after another, on two pictures.

    Args:
        mask: the blocks to keep, bool [K].
        form: of parts with integers.

    Raises:
        EngineError: a part computes something else in that form.
        ExportError: the model gives other logits.
        UsageError: parts of bf16, which cannot be run here.
        BundleError: the file cannot be written.
    """
    network, tolerance = source.network, _tolerance(source.precision)
    taken = [(part, *portable_part(part, source.model(part), form)) for part in parts_of_path(network, mask)]
    pieces = [(part, piece) for part, piece, _ in taken]
    model = compose_parts("path", pieces)
    images = _pictures(network, _N_PICTURES, seed=0)
    x = {"image": images}
    for part, piece in pieces:
        x = OnnxReference(piece).run({part.inputs[0].name: next(iter(x.values()))})
    error = _error(x, OnnxReference(model).run({"image": images}), tolerance=tolerance)
    _write(path, model, network, policy=bits_of(mask))
    return max(error, *(error for _, _, error in taken))


def _write(path: Path, model: bytes, network: NetworkSpec, **decision: float | str) -> None:
    """Write a model with what its caller must know in its metadata; `decision` says how its blocks were chosen."""
    written = onnx.ModelProto.FromString(model)
    facts = {
        "preprocessing": dict_from_preprocessing(network.preprocessing),
        "labels": network.labels,
        **decision,
    }
    onnx.helper.set_model_props(written, {name: json.dumps(fact) for name, fact in facts.items()})
    try:
        write_output(path, written.SerializeToString(deterministic=True))
    except OSError as exc:
        raise BundleError(f"{path} cannot be written ({exc.strerror or exc}); choose another place") from exc


def _pictures(network: NetworkSpec, n: int, *, seed: int) -> np.ndarray:
    size = network.preprocessing
    return preprocess(synthetic_images(n, height=size.height, width=size.width, seed=seed), size)


def _tolerance(precision: str) -> float:
    """Return how far a model may be from its own parts: fp16 alone, which the CPU emulates, rounds otherwise in one."""
    if precision == "bf16":
        raise UsageError(
            "precision bf16: ONNX Runtime's CPU provider has none, so that the file could not be compared with its "
            "parts. Give fp16, int8, mixed or fp32"
        )
    return ENGINE_BOUNDS["fp16" if precision == "fp16" else "fp32"].tolerance


def _error(expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], *, tolerance: float) -> float:
    result = compare_outputs(expected, actual, tolerance=tolerance)
    if not result.ok:
        raise ExportError(
            f"the fused model differs from its parts by {result.error:.2g} of the logits' range; report this"
        )
    return result.error


def _masks(n_blocks: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.ones(n_blocks, bool), np.zeros(n_blocks, bool), *(rng.random((_N_MASKS, n_blocks)) < 0.5)]


@dataclass(frozen=True)
class _Check:
    """The fused model beside the parts that it was made of."""

    network: NetworkSpec
    fused: OnnxReference
    pieces: dict[str, bytes]
    tolerance: float

    def error(self, mask: np.ndarray | None, seed: int) -> float:
        """Return the error of the logits for a mask bool [K]; None leaves it to the policy network."""
        network = self.network
        image = _pictures(network, 1, seed=seed)
        expected_keep = self._policy(image) if mask is None else mask
        force = np.zeros(network.n_blocks) if mask is None else np.where(mask, FORCE_KEEP, FORCE_DROP)
        path = [(part, self.pieces[part.name]) for part in parts_of_path(network, expected_keep)]
        expected = OnnxReference(compose_parts("path", path)).run({"image": image})
        actual = self.fused.run({"image": image, "force": force.astype(np.uint8)})
        if (actual["keep"] != expected_keep).any():
            raise ExportError("the fused model keeps other blocks than its parts do; report this")
        return _error(expected, actual, tolerance=self.tolerance)

    def _policy(self, image: np.ndarray) -> np.ndarray:
        if (always := self.network.default_keep()) is not None:
            return always
        policy = self.network.require("policy")
        [probability] = OnnxReference(self.pieces[policy.name]).run({"image": image}).values()
        keep: np.ndarray = probability[0] >= self.network.threshold
        return keep

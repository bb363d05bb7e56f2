"""A bundle as one ONNX file, for deployments that can hold only one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bdtool.data.synthetic import synthetic_images
from bdtool.errors import BundleError, ExportError
from bdtool.runtime.paths import parts_of_path
from bdtool.runtime.preprocess import preprocess
from engines.base import ENGINE_TOLERANCE
from export.bundle import Bundle
from export.check import OnnxReference, compare_outputs
from export.compose import compose_parts
from export.files import write_bytes
from export.fused import FORCE_DROP, FORCE_KEEP, fuse_parts

_N_MASKS = 4


def write_fused(bundle: Bundle, path: Path) -> float:
    """Fuse the bundle's parts into one ONNX file at `path`; return its worst error over the logits' range.

    The file is compared with its own parts, run one after another, on a picture for each of some random masks, every
    block and none.

    Raises:
        ExportError: the fused model gives other logits.
        BundleError: the file cannot be written.
    """
    network = bundle.network
    pieces = {part.name: bundle.part_path(part).read_bytes() for part in network.parts if part.kind != "full"}
    model = fuse_parts(network, pieces)
    error = max(_error(bundle, model, pieces, mask, seed) for seed, mask in enumerate(_masks(network.n_blocks)))
    try:
        write_bytes(path, model)
    except OSError as exc:
        raise BundleError(f"{path} cannot be written ({exc.strerror or exc}); choose another place") from exc
    return error


def _masks(n_blocks: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.ones(n_blocks, bool), np.zeros(n_blocks, bool), *(rng.random((_N_MASKS, n_blocks)) < 0.5)]


def _error(bundle: Bundle, model: bytes, pieces: dict[str, bytes], mask: np.ndarray, seed: int) -> float:
    network = bundle.network
    size = network.preprocessing
    image = preprocess(synthetic_images(1, height=size.height, width=size.width, seed=seed), size)
    path = compose_parts("path", [(part, pieces[part.name]) for part in parts_of_path(network, mask)])
    force = np.where(mask, FORCE_KEEP, FORCE_DROP).astype(np.uint8)
    expected = OnnxReference(path).run({"image": image})
    actual = OnnxReference(model).run({"image": image, "force": force})
    result = compare_outputs(expected, actual, tolerance=ENGINE_TOLERANCE)
    if not result.ok or (actual["keep"] != mask).any():
        raise ExportError(
            f"the fused model differs from its parts by {result.error:.2g} of the logits' range; report this"
        )
    return result.error

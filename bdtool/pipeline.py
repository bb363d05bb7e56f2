"""A MODEL file becomes a bundle: the step from `bdtool.models` to `export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bdtool.data.synthetic import synthetic_images
from bdtool.models.parts import network_spec, part_modules
from bdtool.models.store import load_model
from bdtool.runtime.preprocess import preprocess
from bdtool.specs import NetworkSpec
from bdtool.version import version
from export.exporter import ExportedPart, export_bundle
from export.files import sha256_of_file
from export.manifest import DEFAULT_MAX_BATCH, Manifest

_N_PROBES = 4  # images that each part is compared on: enough to reach every output channel, few enough for ImageNet


def export_model(
    model_path: Path,
    target: Path,
    *,
    max_batch: int = DEFAULT_MAX_BATCH,
    force: bool = False,
    on_start: Callable[[NetworkSpec], None] = lambda network: None,
    on_part: Callable[[ExportedPart], None] = lambda part: None,
) -> Manifest:
    """Export the MODEL at `model_path` to the bundle directory `target`; see `export.exporter.export_bundle`.

    Raises:
        CheckpointError: the MODEL is damaged.
        BundleError, ExportError: as `export_bundle`.
    """
    digest = sha256_of_file(model_path)  # before it is read: what replaces it later has another
    model = load_model(model_path)
    network = network_spec(model)
    on_start(network)
    size = network.preprocessing
    probes = synthetic_images(_N_PROBES, height=size.height, width=size.width)
    return export_bundle(
        network,
        part_modules(model),
        weights_path=model_path,
        weights_sha256=digest,
        target=target,
        images=preprocess(probes, size),
        max_batch=max_batch,
        provenance={
            **model.spec.provenance,
            "model_sha256": digest,
            "exported_by": f"bdtool {version()}",
        },
        force=force,
        on_part=on_part,
    )

"""A bundle's parts in another precision: a candidate beside the bundle, then in it once its gates are passed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdtool.errors import BundleError
from bdtool.specs import NetworkSpec, PartSpec
from export.bundle import Bundle
from export.compose import compose_parts
from export.files import advice_on, export_lock, remove_leftovers, sha256_of_bytes, write_bytes
from export.manifest import Manifest, PartFile, Variant, write_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PartModel:
    """One part of a candidate; `data` None takes the bundle's exported file."""

    precision: str  # obtained
    data: bytes | None
    error: float = 0.0  # against the fp32 part, over the output's range
    tolerance: float = 0.0


def stage_candidate(
    bundle: Bundle, precision: str, activation: str, models: Mapping[str, PartModel], staging: Path
) -> Bundle:
    """Write the parts below `staging` and return the bundle as it would be with them; its directory is not touched.

    `models` holds every part but `full`, which is composed of the others.
    """
    network = bundle.network.with_activation(activation)
    files = {name: _stage(bundle, precision, name, model, staging) for name, model in models.items()}
    full = network.require("full")
    files[full.name] = _stage(bundle, precision, full.name, _composed(bundle, network, models), staging)
    variant = Variant(activation=activation, files=files, calibration={})
    variants = {**bundle.manifest.variants, precision: variant}
    return Bundle(bundle.path, replace(bundle.manifest, variants=variants), staging=staging)


def with_calibration(candidate: Bundle, precision: str, calibration: Mapping[str, Any], staging: Path) -> Bundle:
    """Return the candidate with the record of how it was made and what its gates measured."""
    variant = replace(candidate.manifest.variants[precision], calibration=calibration)
    variants = {**candidate.manifest.variants, precision: variant}
    return Bundle(candidate.path, replace(candidate.manifest, variants=variants), staging=staging)


def commit_candidate(candidate: Bundle, precision: str, sidecars: Mapping[str, bytes] | None = None) -> Manifest:
    """Put a candidate's parts into the bundle: files under names of their own first, then the manifest, at once.

    `sidecars` are other files of the calibration, such as its table, by their path in the bundle.

    Whenever this stops, the manifest names files that are whole: the old ones or the new ones.

    Raises:
        BundleError: the bundle cannot be written, or was exported anew meanwhile or is just being; its manifest and
            the parts that it names are as they were.
    """
    with export_lock(candidate.path):
        return _commit(candidate, precision, sidecars or {})


def _commit(candidate: Bundle, precision: str, sidecars: Mapping[str, bytes]) -> Manifest:
    now = Bundle.open(candidate.path).manifest  # calibrating took minutes
    if (now.files, now.weights_sha256) != (candidate.manifest.files, candidate.manifest.weights_sha256):
        raise BundleError(
            f"{candidate.path}: was exported anew while the {precision} parts were made from what it held before. It "
            "is as that export left it; run the same command again"
        )
    manifest = replace(now, variants={**now.variants, precision: candidate.manifest.variants[precision]})
    try:
        for part in candidate.network.parts:
            source, target = (
                candidate.part_path(part, precision),
                candidate.path / candidate.files_at(precision)[part.name].file,
            )
            if source != target:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(target, candidate.part_bytes(part, precision))
        for file, data in sidecars.items():
            (candidate.path / file).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(candidate.path / file, data)
        write_manifest(candidate.path, manifest)
    except OSError as exc:
        raise BundleError(
            f"{candidate.path}: the {precision} parts cannot be written ({exc.strerror or exc}). "
            f"Its manifest and the parts that it names are as they were; {advice_on(exc)} and run it again"
        ) from exc
    _remove_unlisted(candidate, precision)
    return manifest


def _stage(bundle: Bundle, precision: str, name: str, model: PartModel, staging: Path) -> PartFile:
    if model.data is None:
        return bundle.manifest.files[name]
    digest = sha256_of_bytes(model.data)
    file = f"onnx/{precision}/{name}-{digest[:12]}.onnx"
    path = staging / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, model.data)
    return PartFile(file=file, sha256=digest, precision=model.precision, error=model.error, tolerance=model.tolerance)


def _composed(bundle: Bundle, network: NetworkSpec, models: Mapping[str, PartModel]) -> PartModel:
    """Return the static network, every block kept, of the same parts."""
    chain = [part for part in network.parts if part.kind in ("stem", "block", "head")]

    def data(part: PartSpec) -> bytes:
        own = models[part.name].data
        return own if own is not None else bundle.part_bytes(part)

    obtained = {models[part.name].precision for part in chain if part.kind == "block"}
    worst = max((models[part.name] for part in chain), key=lambda model: model.error)
    return PartModel(
        precision=obtained.pop() if len(obtained) == 1 else "mixed",
        data=compose_parts("full", [(part, data(part)) for part in chain]),
        error=worst.error,
        tolerance=max(models[part.name].tolerance for part in chain),
    )


def _remove_unlisted(candidate: Bundle, precision: str) -> None:
    """Remove what an earlier calibration of this precision left; what stays harms nothing, as no manifest names it."""
    for directory in (candidate.path, candidate.path / "onnx" / precision):
        remove_leftovers(directory)
    listed = {candidate.path / file.file for file in candidate.files_at(precision).values()}
    for file in (candidate.path / "onnx" / precision).glob("*.onnx"):
        if file in listed:
            continue
        try:
            file.unlink()
        except OSError as exc:
            logger.warning(
                "%s belongs to no part any more and cannot be removed (%s); the bundle is whole without it",
                file,
                exc.strerror or exc,
            )

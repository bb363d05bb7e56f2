"""Write a bundle: every part exported, compared with PyTorch as it is written, and the whole put in place at once.

Work goes on in a hidden directory beside the target, part by part. A run that is interrupted leaves the earlier bundle
whole; the next run takes up the parts whose weights, structure and exporter are unchanged, versions included.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from bdtool.errors import BundleError, ExportError
from bdtool.specs import NetworkSpec, PartSpec
from export.check import Probe, check_part
from export.compose import compose_parts
from export.files import (
    advice_on,
    atomic_path,
    export_lock,
    is_leftover,
    json_from_bytes,
    sha256_of_bytes,
    sha256_of_file,
    swap_directory,
    write_bytes,
    write_json,
)
from export.manifest import (
    EXPORTED,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Manifest,
    PartFile,
    read_manifest,
    why_no_manifest,
    write_manifest,
)
from export.onnx_model import OnnxExporter, fold_batch_norm, structure
from export.packages import installed_version
from export.tracing import OPSET
from export.walk import walk

_RECORDS = "records"
_WRITERS = ("bdtool", "torch", "onnx", "onnxscript")  # another version of one may write a part otherwise
_ENTRIES = frozenset({MANIFEST_NAME, WEIGHTS_NAME, "onnx", "engines", "calibration"})  # of a bundle


@dataclass(frozen=True, kw_only=True)
class ExportedPart:
    """One finished part: `reused` when an interrupted run had already written it."""

    name: str
    file: PartFile
    reused: bool


def export_bundle(
    network: NetworkSpec,
    modules: Mapping[str, nn.Module],
    *,
    weights_path: Path,
    weights_sha256: str | None = None,
    target: Path,
    images: np.ndarray,
    max_batch: int,
    provenance: Mapping[str, Any],
    force: bool = False,
    on_part: Callable[[ExportedPart], None] = lambda part: None,
) -> Manifest:
    """Export `network` to the bundle directory `target` and return its manifest.

    Args:
        modules: the PyTorch module of each part, in eval mode, by part name.
        weights_path: the MODEL file; the bundle keeps a copy.
        weights_sha256: of the file that `modules` were loaded from; None does not compare it with the copy.
        images: preprocessed float32 [n, 3, H, W], n >= 2; each part is compared on what they become inside the network.
        force: replace an existing bundle. Engines in it are kept where it was exported from the same MODEL, but for
            those of calibrated precisions, whose parts are gone.

    Raises:
        BundleError: the target exists (and `force` is False), is not a bundle, or cannot be written.
        ExportError: a part's ONNX differs from PyTorch by more than its precision allows, or the MODEL file was
            replaced meanwhile.
    """
    _check_target(target, force=force)
    target = target.resolve()  # "." has no name to derive another from, and a symbolic link must stay one
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with export_lock(target):
            _check_target(target, force=force)  # again: another export may have ended since
            (partial / "onnx").mkdir(parents=True, exist_ok=True)
            (partial / _RECORDS).mkdir(exist_ok=True)
            network, files = _write_parts(network, modules, partial, images, on_part)
            manifest = Manifest(
                network=network,
                files=files,
                weights_file=WEIGHTS_NAME,
                weights_sha256=_copy_weights(weights_path, partial, weights_sha256),
                max_batch=max_batch,
                provenance=provenance,
                environment=_environment(),
            )
            write_manifest(partial, manifest)
            _put_in_place(partial, target, manifest)
    except OSError as exc:
        raise BundleError(
            f"{target}: writing stopped ({exc.strerror or exc}). What was there before is unchanged"
            f"{f'; the finished parts wait in {partial.name}' if partial.exists() else ''}. "
            f"{advice_on(exc).capitalize()}, or choose another place, and run the same command again"
        ) from exc
    return manifest


def _check_target(target: Path, *, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file, not a bundle; it is left alone. Choose another -o BUNDLE")
    if why := why_no_manifest(target):
        raise BundleError(f"{target} exists and is not a bundle: {why}; it is left alone. {_advice_on_target(target)}")
    if not force:
        raise BundleError(f"{target} already holds a bundle; pass --force to replace it")
    names = {entry.name for entry in target.iterdir() if not is_leftover(entry.name, _ENTRIES)}
    if others := sorted(names - _ENTRIES):
        raise BundleError(
            f"{target} holds what is no part of a bundle and would be deleted: {', '.join(others)}. Move it away, or "
            "choose another -o BUNDLE"
        )
    if locked := [folder for folder in _folders(target) if not os.access(folder, os.W_OK)]:
        command = f"chmod -R u+w {shlex.quote(str(target))}"
        raise BundleError(
            f"{target} is not replaced: {locked[0]} is read-only. Make it writable ({command}), or choose another "
            "-o BUNDLE"
        )


def _folders(target: Path) -> Iterator[Path]:
    """Yield the directories of a bundle: to remove it, files must be removed from each."""
    return (Path(folder) for folder, _, _ in os.walk(target))


def _advice_on_target(target: Path) -> str:
    """Return what to do about a target that is no bundle, or no longer looks like one."""
    if {WEIGHTS_NAME, "onnx"} & {entry.name for entry in target.iterdir()}:
        command = f"rm -r {shlex.quote(str(target))}"
        return f"If it is what is left of a bundle, remove it yourself ({command}); else choose another -o BUNDLE"
    return "Choose another -o BUNDLE"


def _write_parts(
    network: NetworkSpec,
    modules: Mapping[str, nn.Module],
    partial: Path,
    images: np.ndarray,
    on_part: Callable[[ExportedPart], None],
) -> tuple[NetworkSpec, dict[str, PartFile]]:
    """Write every part and `full.onnx`; return the network with its full part, and the files by part name."""
    # folded anew when they are written: together they would be all weights once more
    writer = _PartWriter(partial, OnnxExporter((fold_batch_norm(modules[p.name]), p) for p in network.parts))
    network = network.with_full()
    files: dict[str, PartFile] = {}
    for probe in walk(network, modules, images):
        if probe.part.kind == "full":
            done = writer.write_full(probe, network)
        else:
            done = writer.write(probe, modules[probe.part.name])
        files[done.name] = done.file
        on_part(done)
    return network, files


class _PartWriter:
    """Writes parts into the partial bundle, taking up what an interrupted run left there."""

    def __init__(self, partial: Path, exporter: OnnxExporter) -> None:
        self._partial = partial
        self._exporter = exporter
        self._versions = {name: installed_version(name) for name in _WRITERS}

    def write(self, probe: Probe, module: nn.Module) -> ExportedPart:
        folded = fold_batch_norm(module)
        key = _content_key(probe.part, folded)
        return self._finish(probe, key, lambda: self._exporter.onnx_from_module(folded, probe.part))

    def write_full(self, probe: Probe, network: NetworkSpec) -> ExportedPart:
        chain = [part for part in network.parts if part.kind in ("stem", "block", "head")]
        pieces = [(part, (self._partial / _onnx_file(part)).read_bytes()) for part in chain]
        key = sha256_of_bytes("".join(sha256_of_bytes(data) for _, data in pieces).encode())
        return self._finish(probe, key, lambda: compose_parts(probe.part.name, pieces))

    def _finish(self, probe: Probe, key: str, make: Callable[[], bytes]) -> ExportedPart:
        """Take up the part from an interrupted run, or make it, compare it with PyTorch and write it."""
        part = probe.part
        record_path = self._partial / _RECORDS / f"{part.name}.json"
        made_of = {"key": key, "versions": self._versions}
        earlier = _earlier(record_path, made_of, self._partial)
        if earlier is not None:
            return ExportedPart(name=part.name, file=earlier, reused=True)
        model = make()
        comparison = check_part(part.name, model, probe.feeds, probe.expected)
        file = PartFile(
            file=_onnx_file(part),
            sha256=sha256_of_bytes(model),
            precision=EXPORTED,
            error=comparison.error,
            tolerance=comparison.tolerance,
        )
        write_bytes(self._partial / file.file, model)
        write_json(record_path, {**made_of, "file": asdict(file)})
        return ExportedPart(name=part.name, file=file, reused=False)


def _onnx_file(part: PartSpec) -> str:
    return f"onnx/{part.name}.onnx"


def _earlier(record_path: Path, made_of: Mapping[str, Any], partial: Path) -> PartFile | None:
    """Return the part that an interrupted run finished, if it was made of the same and is still whole."""
    try:
        record = json_from_bytes(record_path.read_bytes())
        file = PartFile(**record["file"])
        is_same = all(record[name] == value for name, value in made_of.items())
        fits = is_same and sha256_of_file(partial / file.file) == file.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return file if fits else None


def _content_key(part: PartSpec, folded: torch.fx.GraphModule) -> str:
    digest = hashlib.sha256(f"{part}{structure(folded)}{OPSET}".encode())
    for name, tensor in folded.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _copy_weights(weights_path: Path, partial: Path, expected: str | None) -> str:
    """Copy the MODEL and return its digest, which is the expected one: exporting took minutes."""
    with atomic_path(partial / WEIGHTS_NAME) as temporary:
        shutil.copyfile(weights_path, temporary)
    found = sha256_of_file(partial / WEIGHTS_NAME)
    if expected is not None and found != expected:
        raise ExportError(
            f"{weights_path} was replaced while it was exported: it had SHA-256 {expected[:12]}..., now it has "
            f"{found[:12]}.... What was at the place of the bundle before is unchanged; run the same command again"
        )
    return found


def _put_in_place(partial: Path, target: Path, manifest: Manifest) -> None:
    """Make the finished directory the bundle.

    Engines of the one before come along where it was exported from the same MODEL, with what was noted beside them:
    frequent masks, and the fastest strategy.
    """
    mine = {partial / name for name in (MANIFEST_NAME, WEIGHTS_NAME, "onnx")}
    mine |= {partial / file.file for file in manifest.files.values()}
    # the others are the records, and what earlier runs left: of another model, or killed within `swap_directory`
    for entry in (*partial.iterdir(), *(partial / "onnx").iterdir()):
        if entry not in mine:
            _remove(entry)
    before = _earlier_manifest(target)
    if (target / "engines").is_dir() and before is not None and before.weights_sha256 == manifest.weights_sha256:
        shutil.copytree(target / "engines", partial / "engines", ignore=_of_precisions(tuple(before.variants)))
    swap_directory(partial, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def calibrated_precisions(bundle: Path) -> tuple[str, ...]:
    """Return the precisions that were calibrated into a bundle, which an export over it does not keep."""
    before = _earlier_manifest(bundle)
    return () if before is None else tuple(before.variants)


def _earlier_manifest(bundle: Path) -> Manifest | None:
    try:
        return read_manifest(bundle)
    except BundleError:  # none there, or damaged; its engines belong to nobody knows what
        return None


def _of_precisions(precisions: tuple[str, ...]) -> Callable[[str, list[str]], set[str]]:
    """Return what leaves out the directories of engines in these precisions, for `shutil.copytree`."""
    return lambda directory, names: {name for name in names if name.endswith(tuple(f"-{p}" for p in precisions))}


def _environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "exporter": "torch.onnx.export(dynamo=True)",
        "opset": str(OPSET),
        "platform": platform.platform(),
    }

"""A bundle with only what a deployment needs: `bdtool pack`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bdtool.errors import BundleError, UsageError
from bdtool.runtime import masks, recommendation
from bdtool.serving.triton_files import BUNDLE, VERSION, write_triton_files
from bdtool.specs import PartSpec
from bdtool.words import counted
from engines.base import DEFAULT_BACKEND
from engines.copying import copy_engines
from engines.registry import require_backend
from export.bundle import Bundle
from export.files import advice_on, export_lock, swap_directory, write_bytes
from export.manifest import write_manifest
from export.part_source import PartSource


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What was packed, and the size of it all."""

    n_parts: int
    precision: str  # of these parts: fp32 where a backend makes those of fp16 from them
    engines: tuple[str, ...]  # directories of engines, in place of ONNX parts
    size_bytes: int
    whole_size_bytes: int


def pack(
    bundle: Bundle,
    target: Path,
    *,
    precision: str = "fp32",
    engines: str | None = None,
    with_full: bool = False,
    for_triton: bool = False,
) -> Packed:
    """Write a bundle of one precision without weights, engines and `full`, whose parts are built where it is opened.

    Frequent masks that `bdtool build` noted go with it.

    Args:
        target: a directory that is not there yet, or empty.
        engines: a backend, whose engines in `bundle` are taken instead of the ONNX parts: nothing has to be built, but
            it opens only where these engines run.
        with_full: keep `full`, too, which `bdtool profile` and strategy `full` need.
        for_triton: make `target` a model of Triton's repository that serves the bundle, which lies in it.

    Raises:
        BundleError: there are no parts of the precision, or no engines; a file is damaged; or `target` is taken, or
            cannot be written.
        UsageError: no such precision or backend, or for Triton a precision that neither bundle nor backend has.
    """
    if engines is not None:
        require_backend(engines)
    source = PartSource(bundle, precision, converts_fp16=True)
    if for_triton and engines is None and source.stored != precision:
        raise UsageError(
            f"{bundle.path} has no {precision} parts, and {DEFAULT_BACKEND}, which would serve them, makes none. Name "
            "a backend that does, with engines that were built for it (--engines), or calibrate the bundle first"
        )
    parts = [part for part in bundle.network.parts if with_full or part.kind != "full"]
    kept = {bundle.files_at(source.stored)[part.name].file for part in parts}
    variants = {name: variant for name, variant in bundle.manifest.variants.items() if name == precision}
    manifest = replace(bundle.manifest, variants=variants)
    with _new_directory(target) as model:
        directory = model / VERSION / BUNDLE if for_triton else model
        if engines is None:
            _copy_parts(bundle, directory, parts, source.stored)
            copied = []
        else:
            kept = set()
            digests = {part.name: bundle.part_sha256(part, source.stored) for part in parts}
            copied = _copy_all_engines(bundle, directory, f"{engines}-[0-9]*-{precision}", digests)
        for noted in bundle.engines_path.glob(f"*-{precision}/{masks.FILE}"):
            _copy(noted, directory / "engines" / noted.parent.name)
        if for_triton:
            on_cpu = all("-cpu" in name for name in copied)  # their target; there are none where ONNX parts go
            write_triton_files(model, bundle, precision=precision, backend=engines, on_cpu=on_cpu)
        write_manifest(directory, replace(manifest, left_out=frozenset(manifest.listed) - kept))
    return Packed(
        n_parts=len(parts),
        precision=source.stored if engines is None else precision,
        engines=tuple(copied),
        size_bytes=_size(target),
        whole_size_bytes=_size(bundle.path),
    )


def _copy_parts(bundle: Bundle, directory: Path, parts: Sequence[PartSpec], precision: str) -> None:
    for part in parts:
        path = directory / bundle.files_at(precision)[part.name].file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, bundle.part_bytes(part, precision))


def _copy_all_engines(bundle: Bundle, directory: Path, pattern: str, digests: dict[str, str]) -> list[str]:
    """Copy every directory of engines of that name that has all parts, and what `auto` takes there."""
    copied = []
    for built in sorted(bundle.engines_path.glob(pattern)):
        to = directory / "engines" / built.name
        if copy_engines(built, to, digests):
            copied.append(built.name)
            if (noted := built / recommendation.FILE).is_file():
                _copy(noted, to)
    if not copied:
        present = sorted(path.name for path in bundle.engines_path.glob("*"))
        raise BundleError(
            f"{bundle.path}: no directory {pattern} has whole engines of all {counted(len(digests), 'part')}; it has "
            f"{', '.join(present) or 'none'}. Build them in a whole bundle: bdtool build, with this --backend and "
            "--precision"
        )
    return copied


def _copy(file: Path, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / file.name, file.read_bytes())


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Give a directory to write to, which becomes `target` when all went well."""
    _require_free(target)
    target = target.resolve()
    partial = target.with_name(f".{target.name}.packing")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with export_lock(target):
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            try:
                yield partial
                _require_free(target)  # again: it may have been taken since, by others than bdtool, too
                swap_directory(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as exc:
        raise BundleError(
            f"{target} cannot be written ({exc.strerror or exc}); {advice_on(exc)} and run the same command again"
        ) from exc


def _require_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"{target} exists; it is left alone. Choose another -o BUNDLE, or remove it")


def _size(directory: Path) -> int:
    size = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # of a build that goes on meanwhile
                size += Path(folder, name).stat().st_size
    return size

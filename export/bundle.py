"""Reading a bundle: the one hand-over between export, engines, calibration and the runtime."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bdtool.errors import BundleError, UsageError
from bdtool.specs import NetworkSpec, PartSpec
from export.files import sha256_of_bytes, sha256_of_files
from export.manifest import CALIBRATED, EXPORTED, Manifest, PartFile, read_manifest


class UnfitPartError(BundleError):
    """An ONNX file that the manifest lists, digest and all, is not the part that it tells of: somebody edited it."""


class Bundle:
    """An opened bundle: its manifest, and files whose digests were checked.

    A bundle can be moved or copied as a whole: every path in it is relative to its directory.
    """

    def __init__(self, path: Path, manifest: Manifest, *, staging: Path | None = None) -> None:
        """Hold a manifest and where its files lie; `staging` is searched first, for parts that are not in yet."""
        self.path = path
        self.manifest = manifest
        self._staging = staging

    @classmethod
    def open(cls, path: Path | str, *, check_digests: bool = True) -> Bundle:
        """Open the bundle in directory `path`.

        Raises:
            BundleError: it is not a bundle, it is damaged or too new, a file is missing, lies outside the bundle, or
                (unless `check_digests` is False) differs from its digest.
        """
        path = Path(path)
        bundle = cls(path, read_manifest(path))
        for file, (what, _) in bundle._files().items():
            bundle._check_present(what, file)
        if check_digests:
            bundle.check_digests()
        return bundle

    @property
    def network(self) -> NetworkSpec:
        return self.manifest.network

    def with_threshold(self, threshold: float | None) -> Bundle:
        """Return the bundle, as it is on disk, with another threshold of its policy network; None leaves it."""
        network = self.network.with_threshold(threshold)
        return Bundle(self.path, replace(self.manifest, network=network), staging=self._staging)

    @property
    def weights_path(self) -> Path:
        """The MODEL that the bundle was exported from.

        Raises:
            BundleError: `bdtool pack` left it out.
        """
        self._require("the weights", self.manifest.weights_file)
        return self.path / self.manifest.weights_file

    @property
    def engines_path(self) -> Path:
        return self.path / "engines"

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that can be asked for, the exported one first, unless `bdtool pack` kept another alone."""
        others = sorted(self.manifest.variants)
        if others and self.manifest.left_out:
            chain = (part for part in self.network.parts if part.kind != "full")
            if any(self.manifest.files[part.name].file in self.manifest.left_out for part in chain):
                return tuple(others)
        return (EXPORTED, *others)

    def network_at(self, precision: str) -> NetworkSpec:
        """Return the network with the dtypes that its activations have in that precision."""
        self.require_precision(precision)
        if precision == EXPORTED:
            return self.network
        return self.network.with_activation(self.manifest.variants[precision].activation)

    def files_at(self, precision: str) -> Mapping[str, PartFile]:
        """Return the files of that precision by part name."""
        self.require_precision(precision)
        return self.manifest.files if precision == EXPORTED else self.manifest.variants[precision].files

    def part_path(self, part: PartSpec, precision: str = EXPORTED) -> Path:
        file = self.files_at(precision)[part.name].file
        staged = None if self._staging is None else self._staging / file
        return staged if staged is not None and staged.is_file() else self.path / file

    def holds(self, part: PartSpec, precision: str = EXPORTED) -> bool:
        """Say whether the part's ONNX model is there; `bdtool pack` leaves some out."""
        return self.files_at(precision)[part.name].file not in self.manifest.left_out

    def part_bytes(self, part: PartSpec, precision: str = EXPORTED) -> bytes:
        """Return a part's ONNX model, whose digest is that of the manifest: files can change after `open`.

        Raises:
            BundleError: it differs from its digest, cannot be read, or was left out by `bdtool pack`.
            UnfitPartError: it is no file of that part.
        """
        from export.part_file import why_unfit  # loads onnx, as does whoever takes the bytes

        what = f"part {part.name!r}" if precision == EXPORTED else f"{precision} part {part.name!r}"
        listed = self.files_at(precision)[part.name]
        self._require(what, listed.file)
        try:
            data = self.part_path(part, precision).read_bytes()
        except OSError as exc:
            raise BundleError(
                f"{self.path}: {what}, {listed.file}, cannot be read ({exc.strerror or exc}). Copy the whole bundle, "
                "or export again"
            ) from exc
        if (actual := sha256_of_bytes(data)) != listed.sha256:
            raise BundleError(f"{self.path}: {_difference(what, listed.file, actual, listed.sha256)}")
        if why := why_unfit(data, self.network_at(precision).part(part.name)):
            raise UnfitPartError(
                f"{self.path}: {what}, {listed.file}, {why}. Mend the file and put its SHA-256 in the manifest, or "
                "export the model again"
            )
        return data

    def part_sha256(self, part: PartSpec, precision: str = EXPORTED) -> str:
        return self.files_at(precision)[part.name].sha256

    def has_precision(self, precision: str) -> bool:
        return precision in self.precisions

    def require_precision(self, precision: str) -> None:
        """Raise BundleError unless the bundle holds parts of that precision; UsageError where there is no such one."""
        if self.has_precision(precision):
            return
        if precision not in (EXPORTED, *CALIBRATED):
            raise UsageError(f"unknown precision {precision!r}; expected {', '.join((EXPORTED, *CALIBRATED))}")
        if not self.has_precision(EXPORTED):
            kept = " and ".join(self.precisions)
            raise BundleError(
                f"{self.path} has no {precision} parts; `bdtool pack` kept those of {kept}. Run it with --precision "
                f"{self.precisions[0]}, or take the whole bundle that it was packed from"
            )
        raise BundleError(
            f"{self.path} has no {precision} parts; it has {', '.join(self.precisions)}. "
            f"Use --precision {EXPORTED}, or make them: bdtool calibrate --precision {precision}"
        )

    def check_digests(self) -> None:
        """Compare every file with its digest in the manifest.

        Raises:
            BundleError: a file differs.
        """
        _, differing = self.compare_digests()
        if differing:
            raise BundleError(f"{self.path}: {differing[0]}")

    def compare_digests(self) -> tuple[int, list[str]]:
        """Return how many files were compared with their digests, and what to say of each that differs."""
        files = self._files()
        listed = [file for file in files if self._staging is None or (self.path / file).is_file()]
        with self._named_where_unreadable():
            found = sha256_of_files([self.path / file for file in listed])
        differing = [
            _difference(files[file][0], file, actual, files[file][1])
            for file, actual in zip(listed, found, strict=True)
            if actual != files[file][1]
        ]
        return len(listed), differing

    def _files(self) -> dict[str, tuple[str, str]]:
        """Return what must be there, as `Manifest.listed` gives it."""
        return {file: row for file, row in self.manifest.listed.items() if file not in self.manifest.left_out}

    def _require(self, what: str, file: str) -> None:
        if file in self.manifest.left_out:
            raise BundleError(
                f"{self.path}: {what}, {file}, was left out by `bdtool pack`. Take the whole bundle that this one was "
                "packed from, or pack that with what is needed (`bdtool pack --help`)"
            )

    @contextmanager
    def _named_where_unreadable(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:  # of another user's, in many cases
            raise BundleError(
                f"{self.path}: {exc.filename or 'a file of it'} cannot be read ({exc.strerror or exc}). "
                f"{_advice_on_reading(exc, self.path)}"
            ) from exc

    def _check_present(self, what: str, file: str) -> None:
        path = self.path / file
        real = Path(os.path.realpath(path))  # not Path.resolve, which raises on links in a circle
        if not real.is_relative_to(os.path.realpath(self.path)):  # a symbolic link can leave, too
            raise BundleError(f"{self.path}: {what}, {file}, leads outside the bundle to {real}; export again")
        with self._named_where_unreadable():
            is_file = path.is_file()
        if not is_file:
            raise BundleError(f"{self.path}: {what} is missing: no file {file}. Copy the whole bundle, or export again")


def _difference(what: str, file: str, actual: str, digest: str) -> str:
    return (
        f"{what}, {file}, has SHA-256 {actual[:12]}..., the manifest says {digest[:12]}...: the file was changed or "
        "cut short. Copy the bundle again, or export the model again"
    )


def _advice_on_reading(error: OSError, bundle: Path) -> str:
    if isinstance(error, PermissionError):
        return f"Make the whole bundle readable where it was built: chmod -R a+rX {shlex.quote(bundle.name)}"
    return "Copy the bundle again, or export it anew"

"""Reading a bundle: the one hand-over between export, engines, calibration and the runtime."""

from __future__ import annotations

from pathlib import Path

from bdtool.errors import BundleError
from bdtool.specs import NetworkSpec, PartSpec
from export.files import sha256_of_files
from export.manifest import Manifest, read_manifest


class Bundle:
    """An opened bundle: its manifest, and files whose digests were checked.

    A bundle can be moved or copied as a whole: every path in it is relative to its directory.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str, *, check_digests: bool = True) -> Bundle:
        """Open the bundle in directory `path`.

        Raises:
            BundleError: it is not a bundle, it is damaged or too new, a file is missing, lies outside the bundle, or
                (unless `check_digests` is False) differs from its digest.
        """
        path = Path(path)
        bundle = cls(path, read_manifest(path))
        for what, file, _ in bundle._listed_files():
            bundle._check_present(what, file)
        if check_digests:
            bundle.check_digests()
        return bundle

    @property
    def network(self) -> NetworkSpec:
        return self.manifest.network

    @property
    def weights_path(self) -> Path:
        return self.path / self.manifest.weights_file

    @property
    def engines_path(self) -> Path:
        return self.path / "engines"

    def part_path(self, part: PartSpec) -> Path:
        return self.path / self.manifest.files[part.name].file

    def part_sha256(self, part: PartSpec) -> str:
        return self.manifest.files[part.name].sha256

    def has_precision(self, precision: str) -> bool:
        return any(file.precision == precision for file in self.manifest.files.values())

    def require_precision(self, precision: str) -> None:
        """Raise BundleError unless the bundle holds parts of that precision."""
        held = sorted({file.precision for file in self.manifest.files.values()})
        if precision not in held:
            raise BundleError(
                f"{self.path} has no {precision} parts; it has {', '.join(held)}. Use --precision {held[0]}"
            )

    def check_digests(self) -> None:
        """Compare every file with its digest in the manifest.

        Raises:
            BundleError: a file differs.
        """
        listed = self._listed_files()
        found = sha256_of_files([self.path / file for _, file, _ in listed])
        for (what, file, digest), actual in zip(listed, found, strict=True):
            if actual != digest:
                raise BundleError(
                    f"{self.path}: {what}, {file}, has SHA-256 {actual[:12]}..., the manifest says {digest[:12]}...: "
                    "the file was changed or cut short. Copy the bundle again, or export the model again"
                )

    def _listed_files(self) -> list[tuple[str, str, str]]:
        parts = [(f"part {name!r}", file.file, file.sha256) for name, file in self.manifest.files.items()]
        return [*parts, ("the weights", self.manifest.weights_file, self.manifest.weights_sha256)]

    def _check_present(self, what: str, file: str) -> None:
        path = self.path / file
        if not path.resolve().is_relative_to(self.path.resolve()):  # a symbolic link can leave, too
            raise BundleError(
                f"{self.path}: {what}, {file}, leads outside the bundle to {path.resolve()}; export again"
            )
        if not path.is_file():
            raise BundleError(f"{self.path}: {what} is missing: no file {file}. Copy the whole bundle, or export again")

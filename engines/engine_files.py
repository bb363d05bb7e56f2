"""The files of engines in one directory: for each an engine and a record of what it was built from.

The engine is written before its record, so a build that is killed leaves nothing that looks finished.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from bdtool.errors import BundleError
from engines.base import BuiltEngine
from engines.engine_record import EngineRecord
from export.files import json_from_bytes, sha256_of_bytes, sha256_of_files, write_bytes, write_json


class ChangedEngineError(BundleError):
    """An engine is not the one that its record was written for; a build makes it anew."""


class EngineFiles:
    """Engines and records in `directory`, each by its stem: what the names of its files begin with."""

    def __init__(self, directory: Path, *, suffix: str) -> None:
        self.directory = directory
        self._suffix = suffix

    def engine_name(self, stem: str) -> str:
        return stem + self._suffix

    def record(self, stem: str) -> EngineRecord | None:
        """Return the record of an engine that is there and can be read, whatever its bytes are; None: there is none."""
        try:
            record = EngineRecord(**json_from_bytes(self._record_path(stem).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        engine = self.directory / self.engine_name(stem)
        return record if record.file == engine.name and engine.is_file() and os.access(engine, os.R_OK) else None

    def whole(self, records: list[EngineRecord]) -> list[EngineRecord]:
        """Return the records whose engines have the digests that they say."""
        digests = sha256_of_files([self.directory / record.file for record in records])
        return [record for record, digest in zip(records, digests, strict=True) if digest == record.sha256]

    def read(self, record: EngineRecord) -> bytes:
        """Return the engine whose digest the record has: what is run is what was compared when it was built.

        Raises:
            ChangedEngineError: it cannot be read, or has another digest.
        """
        path = self.directory / record.file
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise ChangedEngineError(
                f"part {record.part!r}: its engine, {path}, cannot be read ({exc.strerror or exc}). Make it readable "
                "or remove it, and run the same command again, which builds it anew"
            ) from exc
        if (digest := sha256_of_bytes(data)) != record.sha256:
            raise ChangedEngineError(
                f"part {record.part!r}: its engine, {path}, has SHA-256 {digest[:12]}..., its record "
                f"says {record.sha256[:12]}...: it was changed or cut short. Run the same command again, which "
                "builds it anew"
            )
        return data

    def write(self, stem: str, record: EngineRecord, built: BuiltEngine) -> None:
        """Write an engine, what an inspector said of its layers, and last its record."""
        layers = self.directory / f"{stem}.layers.json"
        if built.layers is None:
            layers.unlink(missing_ok=True)  # of an earlier engine
        else:
            write_bytes(layers, built.layers.encode())
        write_bytes(self.directory / record.file, built.data)
        write_json(self._record_path(stem), asdict(record))

    def _record_path(self, stem: str) -> Path:
        return self.directory / f"{stem}.engine.json"

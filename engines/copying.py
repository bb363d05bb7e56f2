"""Engines copied from one bundle to another, backend unseen: for `bdtool pack`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from engines.engine_record import EngineRecord
from export.files import json_from_bytes, sha256_of_bytes, write_bytes


def copy_engines(directory: Path, target: Path, digests: Mapping[str, str]) -> bool:
    """Copy the engines of some parts, with their records, from one directory of engines to another.

    Args:
        target: made where it is not there.
        digests: of the ONNX models that they must be built from, by the names of all parts to copy.

    Returns:
        Whether there is an engine of each of the parts; if not, nothing is written.
    """
    found = {name: list(_whole_engines(directory, name, digest)) for name, digest in digests.items()}
    if not all(found.values()):
        return False
    target.mkdir(parents=True, exist_ok=True)
    for pairs in found.values():
        for files in pairs:
            for name, data in files.items():
                write_bytes(target / name, data)
    return True


def _whole_engines(directory: Path, part: str, digest: str) -> Iterator[dict[str, bytes]]:
    """Yield engine and record by file name, of images as pixels and preprocessed, if they are whole and can be run.

    They are read once, as a build may put others in their place at any moment.
    """
    for record_path in (directory / f"{part}.engine.json", directory / f"{part}.pixels.engine.json"):
        try:
            record_data = record_path.read_bytes()
            record = EngineRecord(**json_from_bytes(record_data))
            is_own = record.part == part and Path(record.file).name == record.file
            is_of_model = str(record.onnx_sha256).split("+")[0] == digest  # after it: what was converted, and how
            if not (is_own and is_of_model and record.loadable):
                continue
            engine = (directory / record.file).read_bytes()
            if sha256_of_bytes(engine) == record.sha256:
                yield {record.file: engine, record_path.name: record_data}
        except (OSError, ValueError, TypeError):
            continue

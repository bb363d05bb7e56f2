"""What is noted beside an engine: from what it was built, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What one engine was built from, and what came out."""

    part: str
    onnx_sha256: str
    backend: str
    backend_version: str
    target: str
    precision: str
    layout: str
    file: str
    sha256: str
    error: float | None  # worst difference from the ONNX part, over the output's range; None: could not run here
    settings: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)  # what the backend says that it obtained
    loadable: bool = True

    def __post_init__(self) -> None:
        texts = all(isinstance(text, str) for text in (self.layout, self.file, self.sha256, self.settings))
        if not texts or not isinstance(self.error, float | int | None) or not isinstance(self.details, Mapping):
            raise TypeError(f"the record of part {self.part!r} has a field of another type")  # it may come from a file

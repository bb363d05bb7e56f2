"""MODEL files that come with the package. Loads no torch."""

from __future__ import annotations

from pathlib import Path

_DIRECTORY = Path(__file__).parent / "shipped"


def shipped_models() -> dict[str, Path]:
    """Return the file of each shipped model by its name."""
    return {path.stem: path for path in sorted(_DIRECTORY.glob("*.safetensors"))}

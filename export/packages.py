"""The versions of installed packages, by their metadata: nothing is imported."""

from __future__ import annotations

from importlib import metadata


def installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

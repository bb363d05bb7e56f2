"""The installed version of bdtool."""

from importlib import metadata


def version() -> str:
    """Return the version from the installed package's metadata, or "0+unknown" in a tree that is not installed."""
    try:
        return metadata.version("bdtool")
    except metadata.PackageNotFoundError:
        return "0+unknown"

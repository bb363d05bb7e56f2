"""The installed version of bdtool."""

from export.packages import installed_version


def version() -> str:
    """Return the version from the installed package's metadata, or "0+unknown" in a tree that is not installed."""
    return installed_version("bdtool") or "0+unknown"

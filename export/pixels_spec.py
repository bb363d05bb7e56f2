"""What the store of engines must know of parts that take pixels; `export.pixels` makes them. Loads no ONNX."""

from bdtool.specs import Preprocessing

_VERSION = "1"  # of what `export.pixels` writes: engines built from an older conversion are built again


def pixels_key(preprocessing: Preprocessing) -> str:
    """Return what such a part has in it besides the exported one, as a text to compare."""
    return f"pixels{_VERSION}:{preprocessing.height}x{preprocessing.width}:{preprocessing.mean}:{preprocessing.std}"

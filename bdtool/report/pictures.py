"""Images as data URIs, small enough for a page with hundreds of them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_LARGEST_SIDE = 96  # larger pictures are scaled down; smaller ones stay as they are and the page enlarges them


def uri_from_pixels(pixels: np.ndarray) -> str:
    """Return a picture uint8 [H, W, 3] as data URI: PNG, exact, where it is small, else a JPEG thumbnail."""
    image = Image.fromarray(pixels)
    kind = "png" if max(image.size) <= _LARGEST_SIDE else "jpeg"
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    file = io.BytesIO()
    image.save(file, format=kind, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"

"""What a part's engine is fed with in a comparison, which may be another form of the images than the ONNX part's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bdtool.specs import PIXELS
from engines.base import Engine


def feeds_for(engine: Engine, feeds: Mapping[str, np.ndarray], images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the ONNX part's feeds, with the pixels themselves where the engine normalises them.

    Args:
        images: uint8 [n, height, width, 3], of which the feeds were made.
    """
    return {t.name: images if t.dtype == PIXELS else feeds[t.name] for t in engine.inputs}

"""Activation layouts: plain NCHW, NCHW with the channels in blocks of b innermost ("NCHW16c"), and channels-last."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from bdtool.specs import PartSpec, TensorSpec
from engines.base import PLAIN_LAYOUT, Engine

CHANNELS_LAST = "NHWC"


def feature_maps(part: PartSpec) -> list[TensorSpec]:
    """Return the activations of rank 4 that a part reads and writes, the tensors that a layout is about."""
    pairs = (*zip(part.reads, part.inputs, strict=True), *zip(part.writes, part.outputs, strict=True))
    return [tensor for activation, tensor in pairs if activation == "x" and len(tensor.shape) == 4]


def block_size(layout: str) -> int:
    """Return b of "NCHW<b>c", or 1 for plain NCHW."""
    if layout == PLAIN_LAYOUT:
        return 1
    match = re.fullmatch(r"NCHW(\d+)c", layout)
    if match is None:
        raise ValueError(f"unknown layout {layout!r}; known: NCHW, NCHW<b>c")
    return int(match[1])


def pack(values: np.ndarray, layout: str) -> np.ndarray:
    """Return plain [N, C, H, W] values in `layout`, in an array of the same shape (the bytes are rearranged)."""
    b = _block_of(values, layout)
    if b == 1:
        return values
    n, c, h, w = values.shape
    return np.ascontiguousarray(values.reshape(n, c // b, b, h, w).transpose(0, 1, 3, 4, 2)).reshape(n, c, h, w)


def unpack(values: np.ndarray, layout: str) -> np.ndarray:
    """Undo `pack`."""
    b = _block_of(values, layout)
    if b == 1:
        return values
    n, c, h, w = values.shape
    return np.ascontiguousarray(values.reshape(n, c // b, h, w, b).transpose(0, 1, 4, 2, 3)).reshape(n, c, h, w)


def _block_of(values: np.ndarray, layout: str) -> int:
    """Return how many channels of an activation lie side by side; vectors are never packed."""
    if values.ndim != 4:
        return 1
    return int(values.shape[1]) if layout == CHANNELS_LAST else block_size(layout)


def run_plain(engine: Engine, part: PartSpec, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an engine on plain NCHW arrays, whatever layout it keeps its activations in."""
    names_in = {t.name for a, t in zip(part.reads, part.inputs, strict=True) if a == "x"}
    names_out = {t.name for a, t in zip(part.writes, part.outputs, strict=True) if a == "x"}
    packed = {name: pack(v, engine.layout) if name in names_in else v for name, v in feeds.items()}
    outputs = engine.run(packed)
    return {name: unpack(v, engine.layout) if name in names_out else v for name, v in outputs.items()}

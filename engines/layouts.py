"""Activation layouts: plain NCHW, channels in blocks of b innermost ("NCHW16c"), channels-last, and integers NHWC."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from bdtool.specs import PartSpec, TensorSpec
from engines.base import PLAIN_LAYOUT, Engine

CHANNELS_LAST = "NHWC"
INTEGER_LAYOUT = "NHWC-uint8"  # int8 activations, channels last, with 128 added; see engines.integer_cpu
_OFFSET = 128


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
        raise ValueError(f"unknown layout {layout!r}; known: NCHW, NCHW<b>c, {INTEGER_LAYOUT}")
    return int(match[1])


def pack(values: np.ndarray, layout: str) -> np.ndarray:
    """Return plain [N, C, H, W] values in `layout`, in an array of the same shape (the bytes are rearranged)."""
    if layout == INTEGER_LAYOUT:
        return _shift(values.transpose(0, 2, 3, 1)).reshape(values.shape)
    b = _block_of(values, layout)
    if b == 1:
        return values
    n, c, h, w = values.shape
    return np.ascontiguousarray(values.reshape(n, c // b, b, h, w).transpose(0, 1, 3, 4, 2)).reshape(n, c, h, w)


def unpack(values: np.ndarray, layout: str) -> np.ndarray:
    """Undo `pack`."""
    if layout == INTEGER_LAYOUT:
        n, c, h, w = values.shape
        return _shift(values.reshape(n, h, w, c).transpose(0, 3, 1, 2))
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


def _shift(values: np.ndarray) -> np.ndarray:
    """Return int8 values with 128 added, modulo 256: zero point 0 becomes 128, and back."""
    return (np.ascontiguousarray(values).view(np.uint8) ^ _OFFSET).view(np.int8)


def run_plain(engine: Engine, part: PartSpec, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an engine on plain NCHW arrays, whatever layout it keeps its activations in."""
    names_in = {t.name for a, t in zip(part.reads, part.inputs, strict=True) if a == "x"}
    names_out = {t.name for a, t in zip(part.writes, part.outputs, strict=True) if a == "x"}
    packed = {name: pack(v, engine.layout) if name in names_in else v for name, v in feeds.items()}
    outputs = engine.run(packed)
    return {name: unpack(v, engine.layout) if name in names_out else v for name, v in outputs.items()}

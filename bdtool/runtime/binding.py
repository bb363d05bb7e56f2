"""Engines bound to buffers for one batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bdtool.runtime.strategies import WrapCall
from bdtool.specs import PartSpec, TensorSpec
from engines.base import Backend, Buffer, Call, Engine


@dataclass(frozen=True, kw_only=True)
class Binder:
    """Allocates buffers for `n_images` images, and binds the engines of parts to them.

    `min_batch` is the smallest batch that all of the engines take.
    """

    backend: Backend
    engines: Mapping[str, Engine]
    n_images: int
    wrap: WrapCall
    min_batch: int = 1

    def allocate(self, tensor: TensorSpec) -> Buffer:
        return self.backend.allocate(tensor.shape_for(self.n_images), tensor.dtype)

    def bind(self, part: PartSpec, inputs: Sequence[Buffer], outputs: Sequence[Buffer]) -> Call:
        """Return a part's call on buffers in the order of its inputs and outputs."""
        call = self.engines[part.name].bind(
            {tensor.name: buffer for tensor, buffer in zip(part.inputs, inputs, strict=True)},
            {tensor.name: buffer for tensor, buffer in zip(part.outputs, outputs, strict=True)},
        )
        return self.wrap(part, call)

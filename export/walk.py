"""A network run part by part in PyTorch, every block kept: the real inputs and outputs of each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from bdtool.specs import NetworkSpec, PartSpec
from export.check import Probe


def walk(network: NetworkSpec, modules: Mapping[str, nn.Module], images: np.ndarray) -> Iterator[Probe]:
    """Give a probe of each part in running order, the whole network (`full`) included where it is listed.

    Args:
        modules: in eval mode, by part name; the part `full` needs none.
        images: preprocessed float32 [n, 3, H, W].
    """
    state = {"image": torch.from_numpy(images)}
    before_block = state
    for part in network.parts:
        if part.kind == "full":
            yield _probe(part, [state["image"]], [state["logits"]])
            continue
        if part.kind == "block":
            before_block = dict(state)
        source = before_block if part.kind == "shortcut" else state  # a shortcut reads what its block read
        inputs = [source[activation] for activation in part.reads]
        with torch.inference_mode():
            result = modules[part.name](*inputs)
        outputs = list(result) if isinstance(result, tuple) else [result]
        if part.kind != "shortcut":
            state.update(zip(part.writes, outputs, strict=True))
        yield _probe(part, inputs, outputs)


def _probe(part: PartSpec, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> Probe:
    return Probe(
        part=part,
        feeds={tensor.name: value.numpy() for tensor, value in zip(part.inputs, inputs, strict=True)},
        expected={tensor.name: value.numpy() for tensor, value in zip(part.outputs, outputs, strict=True)},
    )

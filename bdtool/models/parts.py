"""A model as the list of parts that export, calibration, engines and the runtime walk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bdtool.models.model import BlockDropModel
from bdtool.models.resnet import ResidualBlock
from bdtool.models.state import meta_model
from bdtool.specs import BATCH_AXIS, NetworkSpec, PartKind, PartSpec, TensorSpec


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A module and its place in the network."""

    name: str
    kind: PartKind
    index: int | None
    module: nn.Module


# kind -> what it reads and writes, and the names of its input and output tensor
_WIRING: dict[PartKind, tuple[str, str, str, str]] = {
    "policy": ("image", "keep_probability", "image", "keep_probability"),
    "stem": ("image", "x", "image", "y"),
    "block": ("x", "x", "x", "y"),
    "shortcut": ("x", "x", "x", "y"),
    "head": ("x", "logits", "x", "logits"),
}


def part_modules(model: BlockDropModel) -> dict[str, nn.Module]:
    """Return the model's own modules, not copies, by part name and in running order.

    A block includes its shortcut: from `x` it computes relu(shortcut(x) + F(x)). Where the shape changes, the shortcut
    is a part of its own as well, which runs when its block is dropped.
    """
    return {part.name: part.module for part in _parts(model)}


def network_spec(model: BlockDropModel) -> NetworkSpec:
    """Return the parts of `model` with their shapes and FLOPs, counted on a copy without weights."""
    spec = model.spec
    return NetworkSpec(
        arch=spec.arch,
        n_classes=spec.n_classes,
        labels=spec.labels,
        preprocessing=spec.preprocessing,
        stages=spec.architecture.stages,
        parts=_part_specs(meta_model(spec)),
    )


def _parts(model: BlockDropModel) -> list[_Part]:
    n_digits = max(2, len(str(model.n_blocks - 1)))
    parts = [_Part(name="stem", kind="stem", index=None, module=model.base.stem)]
    if model.policy is not None:
        parts.insert(0, _Part(name="policy", kind="policy", index=None, module=model.policy))
    for k, block in enumerate(model.base.blocks):
        assert isinstance(block, ResidualBlock)
        parts.append(_Part(name=f"block_{k:0{n_digits}}", kind="block", index=k, module=block))
        if not isinstance(block.shortcut, nn.Identity):
            parts.append(_Part(name=f"shortcut_{k:0{n_digits}}", kind="shortcut", index=k, module=block.shortcut))
    return [*parts, _Part(name="head", kind="head", index=None, module=model.base.head)]


def _part_specs(model: BlockDropModel) -> tuple[PartSpec, ...]:
    size = model.spec.preprocessing
    image = torch.empty(1, 3, size.height, size.width, device="meta")
    specs = []
    x = before_block = image
    for part in _parts(model):
        if part.kind in ("policy", "stem"):
            source = image
        elif part.kind == "shortcut":  # it starts where its block, the part before it, started
            source = before_block
        else:
            source = before_block = x
        output, flops = _measure(part.module, source)
        if part.kind != "policy":
            x = output
        specs.append(_part_spec(part, source, output, flops))
    return tuple(specs)


def _measure(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Return the output for `x` and its FLOPs: 2 x multiply-accumulates of convolutions and linear layers."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output: Tensor = module(x)
    return output, counter.get_total_flops()


def _part_spec(part: _Part, source: Tensor, output: Tensor, flops: int) -> PartSpec:
    reads, writes, input_name, output_name = _WIRING[part.kind]
    return PartSpec(
        name=part.name,
        kind=part.kind,
        index=part.index,
        reads=(reads,),
        writes=(writes,),
        inputs=(_tensor_spec(input_name, source),),
        outputs=(_tensor_spec(output_name, output),),
        flops=flops,
    )


def _tensor_spec(name: str, example: Tensor) -> TensorSpec:
    return TensorSpec(name=name, shape=(BATCH_AXIS, *example.shape[1:]))

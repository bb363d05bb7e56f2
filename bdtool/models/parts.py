"""A model's modules, part by part, as export, calibration, engines and the runtime walk them."""

from __future__ import annotations

from torch import nn

from bdtool.models.layout import network_from_spec, part_name
from bdtool.models.model import BlockDropModel
from bdtool.models.resnet import ResidualBlock
from bdtool.specs import NetworkSpec


def part_modules(model: BlockDropModel) -> dict[str, nn.Module]:
    """Return the model's own modules, not copies, by part name and in running order.

    A block includes its shortcut: from `x` it computes relu(shortcut(x) + F(x)). Where the shape changes, the shortcut
    is a part of its own as well, which runs when its block is dropped.
    """
    modules: dict[str, nn.Module] = {} if model.policy is None else {"policy": model.policy}
    modules["stem"] = model.base.stem
    for k, block in enumerate(model.base.blocks):
        assert isinstance(block, ResidualBlock)
        modules[part_name("block", k, model.n_blocks)] = block
        if not isinstance(block.shortcut, nn.Identity):
            modules[part_name("shortcut", k, model.n_blocks)] = block.shortcut
    return {**modules, "head": model.base.head}


def network_spec(model: BlockDropModel) -> NetworkSpec:
    """Return the parts of `model` with their shapes and FLOPs; see `bdtool.models.layout`."""
    return network_from_spec(model.spec)

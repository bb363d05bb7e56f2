"""State dicts and the models that they fill."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bdtool.models.difference import COUNTER
from bdtool.models.model import BlockDropModel
from bdtool.models.model_spec import ModelSpec


def non_finite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def meta_model(spec: ModelSpec) -> BlockDropModel:
    """Return the model without memory for its weights: enough for names, shapes and FLOPs. In eval mode."""
    with torch.device("meta"):
        return BlockDropModel(spec).eval()


def model_from_state(spec: ModelSpec, state: Mapping[str, Tensor]) -> BlockDropModel:
    """Return a model in eval mode that holds copies of `state`'s tensors, which must have been compared before."""
    model = meta_model(spec).to_empty(device="cpu")
    counters = {name: torch.zeros_like(old) for name, old in model.state_dict().items() if name.endswith(COUNTER)}
    model.load_state_dict({**counters, **state})
    return model

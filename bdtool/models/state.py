"""State dicts against the model they should fill: what is missing, what is too much, what has the wrong shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdtool.models.model import BlockDropModel
from bdtool.models.model_spec import ModelSpec

_MAX_LISTED = 8
_COUNTER = "num_batches_tracked"  # BatchNorm's step counter: only momentum=None reads it, and files before 2018 lack it


@dataclass(frozen=True, kw_only=True)
class StateDifference:
    """How the tensors of a file differ from those a model needs; false when they fit."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]  # "name got [..], needs [..]"

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        named = {"missing": self.missing, "unexpected": self.unexpected, "mis-shaped": self.misshaped}
        return "; ".join(f"{len(names)} {what}: {listing(names)}" for what, names in named.items() if names)


def compare_states(got: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]]) -> StateDifference:
    """Compare tensor shapes by name; BatchNorm's step counters may be absent."""
    return StateDifference(
        missing=tuple(name for name in needed if name not in got and not name.endswith(_COUNTER)),
        unexpected=tuple(name for name in got if name not in needed),
        misshaped=tuple(
            f"{name} got {list(got[name])}, needs {list(needed[name])}"
            for name in needed
            if name in got and list(got[name]) != list(needed[name])
        ),
    )


def listing(names: Sequence[str]) -> str:
    """Return the names joined by commas: the first few, and how many more there are."""
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


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
    counters = {name: torch.zeros_like(old) for name, old in model.state_dict().items() if name.endswith(_COUNTER)}
    model.load_state_dict({**counters, **state})
    return model

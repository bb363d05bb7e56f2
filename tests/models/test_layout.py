"""The layout on paper against the modules that compute it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bdtool.errors import UsageError
from bdtool.models.architectures import known_architectures
from bdtool.models.layout import network_from_spec, tensor_shapes
from bdtool.models.model import ModelSpec
from bdtool.models.parts import part_modules
from bdtool.models.state import meta_model, shapes_of
from bdtool.specs import Preprocessing

SHORTCUTS = ("option-a", "average-pool", "projection")


def _spec(arch, *, shortcut="projection", size=64, has_policy=True, **others):
    preprocessing = Preprocessing(height=size, width=size + 32, mean=(0.5,) * 3, std=(0.2,) * 3)
    return ModelSpec(
        arch=arch,
        n_classes=7,
        labels=None,
        preprocessing=preprocessing,
        shortcut=shortcut,
        has_policy=has_policy,
        provenance={},
        **others,
    )


CASES = [
    *(_spec(arch) for arch in known_architectures()),
    *(_spec(arch, shortcut=shortcut) for arch in ("resnet14", "resnet50") for shortcut in SHORTCUTS),
    *(_spec(arch, policy_hidden=24) for arch in ("resnet14", "resnet18")),
    *(_spec(arch, downscale=2, policy_downscale=4) for arch in ("resnet14", "resnet18")),
    _spec("resnet14", has_policy=False, shortcut="option-a", size=33),
    _spec("resnet206", has_policy=False),
]


@pytest.mark.parametrize(
    "spec", CASES, ids=lambda spec: f"{spec.arch}-{spec.shortcut}-{spec.policy_hidden}-{spec.downscale}"
)
def test_layout_is_what_the_modules_hold_compute_and_cost(spec):
    model = meta_model(spec)
    assert tensor_shapes(spec) == shapes_of(model.state_dict())
    modules, parts = part_modules(model), network_from_spec(spec).parts
    assert [part.name for part in parts] == list(modules)
    for part in parts:
        example = torch.empty(part.inputs[0].shape_for(2), device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert modules[part.name](example).shape == part.outputs[0].shape_for(2), part.name
        assert counter.get_total_flops() == 2 * part.flops, part.name  # of two images


def test_size_that_an_average_pool_cannot_halve_is_refused():
    with pytest.raises(UsageError, match="halves 33 x 65 pixels, which are odd"):
        network_from_spec(_spec("resnet14", shortcut="average-pool", size=33, has_policy=False))


def test_size_that_is_odd_once_it_is_scaled_down_is_refused_so():
    spec = _spec("resnet14", shortcut="average-pool", size=33, downscale=3, has_policy=False)
    with pytest.raises(UsageError, match=r"halves 11 x 21 pixels, which are odd: .*Images, scaled down where"):
        network_from_spec(spec)


def test_size_that_cannot_be_scaled_down_is_refused():
    with pytest.raises(UsageError, match="images of 64 x 96 pixels cannot be scaled down by 65"):
        network_from_spec(_spec("resnet14", policy_downscale=65))

import numpy as np
import pytest
import torch
from torch import nn

from bdtool.models.parts import network_spec, part_modules


@pytest.mark.parametrize(
    ("arch", "n_classes", "flops", "tolerance", "policy_share"),
    [
        ("resnet110", 10, 505_775_360, 0, 0.048),
        ("resnet32", 10, 1.377e8, 0.0005e8, 0.178),
        ("resnet101", 1000, 1.56e10, 0.005e10, 0.030),
    ],
)
def test_flops_are_the_check_values_of_the_paper(make_model, arch, n_classes, flops, tolerance, policy_share):
    spec = network_spec(make_model(arch, n_classes=n_classes))
    assert abs(spec.full_flops - flops) <= tolerance
    assert spec.require("policy").flops / spec.full_flops == pytest.approx(policy_share, abs=0.0005)


def test_policy_network_for_cifar_costs_what_the_paper_says(make_model):
    assert network_spec(make_model("resnet110")).require("policy").flops == pytest.approx(2.448e7, abs=0.0005e7)


def _macs_by_hooks(module, images):
    """Multiply-accumulates of all convolutions and linear layers, from their weights and output sizes."""
    total = 0

    def count(layer, _inputs, output):
        nonlocal total
        total += layer.weight.numel() * (output.shape[-1] * output.shape[-2] if output.dim() == 4 else 1)

    handles = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    module(images)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("arch", ["resnet14", "resnet18", "resnet50"])
def test_flops_are_twice_the_multiply_accumulates_of_every_part(make_model, arch):
    model = make_model(arch, size=64)
    modules = part_modules(model)
    with torch.no_grad():
        for part in network_spec(model).parts:
            example = torch.randn(part.inputs[0].shape_for(1))
            assert part.flops == 2 * _macs_by_hooks(modules[part.name], example), part.name
            assert modules[part.name](example).shape == part.outputs[0].shape_for(1)


@pytest.mark.parametrize("arch", ["resnet14", "resnet50"])
def test_running_the_parts_in_order_equals_the_model(make_model, arch):
    model = make_model(arch, size=64)
    modules, spec = part_modules(model), network_spec(model)
    keep = torch.rand(1, model.n_blocks, generator=torch.Generator().manual_seed(3)) < 0.5
    live = {"image": torch.randn(1, 3, 64, 64)}
    with torch.no_grad():
        for part in spec.parts:
            if part.kind in ("block", "shortcut") and bool(keep[0, part.index]) != (part.kind == "block"):
                continue
            live[part.writes[0]] = modules[part.name](live[part.reads[0]])
        torch.testing.assert_close(live["logits"], model(live["image"], keep), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(live["keep_probability"], model.keep_probability(live["image"]))


def test_modules_and_specs_name_the_same_parts_in_the_same_order(make_model):
    names = [part.name for part in network_spec(make_model("resnet14")).parts]
    assert names == list(part_modules(make_model("resnet14")))
    assert names[:3] == ["policy", "stem", "block_00"]
    assert names[-1] == "head"
    assert [name for name in names if name.startswith("shortcut")] == ["shortcut_02", "shortcut_04"]


def test_more_than_a_hundred_blocks_get_three_digits(make_model):
    names = list(part_modules(make_model("resnet206", has_policy=False)))
    assert names[1] == "block_000"
    assert names[-2] == "block_101"
    assert "shortcut_034" in names


def test_parts_share_the_models_weights_and_leave_it_unchanged(make_model):
    model = make_model("resnet14")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network_spec(model)
    assert part_modules(model)["block_03"] is model.base.blocks[3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dropped_blocks_save_their_flops_and_cost_their_shortcut(make_model):
    spec = network_spec(make_model("resnet14", shortcut="projection"))
    keep = np.ones((2, 6), dtype=bool)
    keep[1, 2] = False
    full, dropped = spec.flops_per_image(keep, with_policy=False)
    assert full == spec.full_flops
    assert full - dropped == spec.part("block_02").flops - spec.part("shortcut_02").flops

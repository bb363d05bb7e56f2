"""Policy networks that start from a trunk, a trained classifier, and trunks that do not fit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bdtool.errors import UsageError
from bdtool.models.model import BlockDropModel
from bdtool.models.parts import network_spec
from bdtool.training.options import CurriculumOptions, ImitateOptions
from bdtool.training.place import TrainingPlace
from bdtool.training.policy_network import with_policy, without_policy
from bdtool.training.stages import Trained, curriculum, imitate
from bdtool.training.trunk import start_from_trunk
from tests.command_line import parse


def test_policy_network_starts_from_a_trunk(random_model: Callable[..., BlockDropModel]) -> None:
    model, trunk = random_model("resnet20"), random_model("resnet8", seed=5)
    start_from_trunk(model, trunk)
    assert model.policy is not None
    for name, tensor in model.policy.trunk.state_dict().items():
        torch.testing.assert_close(tensor, trunk.base.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("stage", [curriculum, imitate])
@pytest.mark.parametrize("has_policy", [False, True])
def test_policy_network_scales_images_down_as_its_trunk_does(
    random_model: Callable[..., BlockDropModel],
    place: Callable[..., TrainingPlace],
    stage: Callable[..., Trained],
    has_policy: bool,
) -> None:
    """Where the model had a policy network, the new one takes its place."""
    start = random_model("resnet8", has_policy=has_policy)
    trunk = random_model("resnet8", has_policy=False, downscale=4, seed=5)
    options = {
        curriculum: CurriculumOptions(epochs=0.25, batch=64),
        imitate: ImitateOptions(epochs=1, batch=64, fewest=1, most=3, judges=32, limit=64),
    }[stage]
    model = stage(start, options, place(), trunk=trunk).model
    assert (model.spec.policy_downscale, model.spec.downscale) == (4, 1)
    assert model.spec.provenance["policy_trunk"] == trunk.spec.provenance
    assert model.policy is not None
    for name in ("stem.conv.weight", "blocks.2.conv2.weight"):
        difference = model.policy.trunk.state_dict()[name] - trunk.base.state_dict()[name]
        assert difference.abs().max() < 0.02, name  # of a step or none
    for name, tensor in model.base.state_dict().items():
        assert torch.equal(tensor, start.base.state_dict()[name]), name
    whole, policy = (network_spec(one).require("policy") for one in (random_model("resnet8"), model))
    assert policy.flops < whole.flops / 15


def test_curriculum_from_a_trunk_keeps_the_hidden_layer_of_the_policy_network(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    start, trunk = random_model("resnet8", policy_hidden=24), random_model("resnet8", has_policy=False)
    options = CurriculumOptions(epochs=0.25, batch=64)
    for given, width in ((start, 24), (without_policy(start), 0)):
        assert curriculum(given, options, place(val=None), trunk=trunk).model.spec.policy_hidden == width


def test_trunk_of_another_architecture_is_refused(
    random_model: Callable[..., BlockDropModel], place: Callable[..., TrainingPlace]
) -> None:
    with pytest.raises(UsageError, match=r"got resnet20 with shortcut .*, expected resnet8"):
        curriculum(random_model("resnet8"), CurriculumOptions(epochs=0.1), place(), trunk=random_model("resnet20"))


def test_trunk_that_was_trained_for_a_mask_is_refused(random_model: Callable[..., BlockDropModel]) -> None:
    trunk = random_model("resnet8", has_policy=False, mask="110")
    with pytest.raises(UsageError, match=r"trained for the mask 110, .* runs all of its blocks; make another with `bd"):
        start_from_trunk(random_model("resnet20"), trunk)


@pytest.mark.parametrize(("arch", "wanted", "downscale"), [("resnet14", "resnet8", 1), ("resnet18", "resnet10", 2)])
def test_command_that_makes_the_trunk_fits_the_model_and_scales_images_down_as_the_paper_does(
    random_model: Callable[..., BlockDropModel], arch: str, wanted: str, downscale: int
) -> None:
    with pytest.raises(UsageError, match=f"expected {wanted} with ") as said:
        with_policy(random_model(arch, size=64), seed=0, trunk=random_model("resnet20", has_policy=False))
    command = str(said.value).split("`")[1].split()
    params = parse([*command[1:], "--data", "cifar10:data", "-o", "trunk.safetensors"]).params
    assert (params["arch"], params["downscale"]) == (wanted, downscale)
    assert (params["size"], params["mean"], params["std"]) == (64, (0.5, 0.4, 0.45), (0.2, 0.25, 0.22))


@pytest.mark.parametrize("other", [{"mean": (0.485, 0.4, 0.45)}, {"std": (0.2, 0.25, 0.225)}, {"width": 48}])
def test_trunk_of_another_input_is_refused_with_the_command_that_makes_one(
    other: dict[str, Any], random_model: Callable[..., BlockDropModel]
) -> None:
    model, trunk = random_model("resnet20", policy_downscale=2), random_model("resnet8", downscale=2)
    wanted = model.spec.preprocessing
    trunk.spec = dataclasses.replace(trunk.spec, preprocessing=dataclasses.replace(wanted, **other))
    with pytest.raises(
        UsageError, match=r"got one for 32 x .*; expected 32 x 32 pixels with mean 0.5,0.4,0.45 "
    ) as said:
        start_from_trunk(model, trunk)
    command = str(said.value).split("`")[1].split()
    params = parse([*command[1:], "--data", "cifar10:data", "-o", "trunk.safetensors"]).params
    assert (params["arch"], params["mean"], params["std"]) == ("resnet8", wanted.mean, wanted.std)
    assert (params["downscale"], params["size"]) == (2, 32)


@pytest.mark.parametrize(
    ("arch", "downscale", "warns"), [("resnet18", 1, True), ("resnet18", 2, False), ("resnet8", 1, False)]
)
def test_trunk_that_costs_more_than_the_papers_is_told(
    arch: str,
    downscale: int,
    warns: bool,
    random_model: Callable[..., BlockDropModel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = random_model(arch, size=64, has_policy=False)
    trunk = random_model(
        "resnet10" if arch == "resnet18" else "resnet8", size=64, has_policy=False, downscale=downscale
    )
    assert with_policy(start, seed=0, trunk=trunk).spec.policy_downscale == downscale
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warns
    assert not warns or "for 4 times the FLOPs of the paper's; make one like" in said[0]
    assert not warns or said[0].endswith("--downscale 2 --mean 0.5,0.4,0.45 --std 0.2,0.25,0.22 --size 64`")


@pytest.mark.parametrize(
    ("trunk_scaling", "said", "command"),
    [
        ({"resize": 73}, "scaled to 73 pixels (bilinear), the model takes them scaled to 64 pixels (bicubic)", True),
        ({"resize": 64}, "scaled to 64 pixels (bilinear), the model takes them scaled to 64 pixels (bicubic)", False),
        ({}, "as they are, the model takes them scaled to 64 pixels (bicubic)", True),
        ({"resize": 64, "interpolation": "bicubic"}, "", False),
    ],
)
def test_trunk_for_pictures_scaled_otherwise_is_told(
    trunk_scaling: dict[str, Any],
    said: str,
    command: bool,
    random_model: Callable[..., BlockDropModel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = random_model("resnet18", size=64, has_policy=False)
    trunk = random_model("resnet10", size=64, has_policy=False, downscale=2)
    usual = trunk.spec.preprocessing
    trunk.spec = dataclasses.replace(trunk.spec, preprocessing=dataclasses.replace(usual, **trunk_scaling))
    scaled = dataclasses.replace(usual, resize=64, interpolation="bicubic")
    start.spec = dataclasses.replace(start.spec, preprocessing=scaled)
    with_policy(start, seed=0, trunk=trunk)
    told = "".join(record.getMessage() for record in caplog.records)
    assert told.startswith(f"trunk: got one for pictures {said}; ") if said else not told
    assert told.endswith("--size 64 --resize-to 64` makes one") == command


@pytest.mark.parametrize(
    ("has_policy", "trunk", "warns"), [(False, False, True), (False, True, False), (True, False, False)]
)
def test_imitation_without_a_trunk_says_how_to_make_one(
    has_policy: bool,
    trunk: bool,
    warns: bool,
    random_model: Callable[..., BlockDropModel],
    place: Callable[..., TrainingPlace],
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = random_model("resnet8", has_policy=has_policy)
    options = ImitateOptions(epochs=1, fewest=3, most=3, judges=8, limit=16)
    given = random_model("resnet8", has_policy=False) if trunk else None
    imitate(start, options, place(val=None), trunk=given)
    command = "`bdtool train pretrain --arch resnet8 --mean 0.5,0.4,0.45 --std 0.2,0.25,0.22 --size 32` makes a trunk"
    assert (command in caplog.text) == ("got no --trunk" in caplog.text) == warns


def test_trunk_of_a_rounded_mean_is_taken(random_model: Callable[..., BlockDropModel]) -> None:
    """That of CIFAR-10 stands in programs as 0.4914 and as 125.3 / 255."""
    model, trunk = random_model("resnet20"), random_model("resnet8")
    rounded = dataclasses.replace(trunk.spec.preprocessing, mean=(0.50003, 0.4, 0.45))
    trunk.spec = dataclasses.replace(trunk.spec, preprocessing=rounded)
    start_from_trunk(model, trunk)
    assert model.policy is not None
    assert torch.equal(model.policy.trunk.stem.conv.weight, trunk.base.stem.conv.weight)

"""What a stage starts from, and what it leaves alone."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bdtool.errors import UsageError
from bdtool.models.model import BlockDropModel
from bdtool.torch_classifier import TorchClassifier
from bdtool.training.budget import shift_policy
from bdtool.training.options import CurriculumOptions, FinetuneOptions
from bdtool.training.stages import Place, curriculum, finetune, start_from_trunk


def test_policy_network_starts_from_a_trunk(random_model: Callable[..., BlockDropModel]) -> None:
    model, trunk = random_model("resnet20"), random_model("resnet8", seed=5)
    start_from_trunk(model, trunk)
    assert model.policy is not None
    for name, tensor in model.policy.trunk.state_dict().items():
        torch.testing.assert_close(tensor, trunk.base.state_dict()[name], rtol=0, atol=0)
    assert model.spec.provenance["policy_trunk"] == trunk.spec.provenance


def test_trunk_of_another_architecture_is_refused(
    random_model: Callable[..., BlockDropModel], place: Callable[..., Place]
) -> None:
    with pytest.raises(UsageError, match=r"got resnet20 with shortcut .*, expected resnet8"):
        curriculum(random_model("resnet8"), CurriculumOptions(epochs=0.1), place(), trunk=random_model("resnet20"))


def test_frozen_policy_stays_and_the_base_learns_its_paths(
    random_model: Callable[..., BlockDropModel], place: Callable[..., Place]
) -> None:
    start = random_model("resnet8", has_policy=True)
    before = copy.deepcopy(start.state_dict())
    trained = finetune(start, FinetuneOptions(epochs=1, batch=20, freeze_policy=True), place()).model.state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], trained[name])}
    assert changed == {"base"}


@pytest.mark.parametrize("blocks", [0.5, 1.75, 2.9])
def test_shifted_policy_keeps_so_many_blocks(
    blocks: float, random_model: Callable[..., BlockDropModel], place: Callable[..., Place]
) -> None:
    model, images = random_model("resnet8", has_policy=True), place().train
    classifier = TorchClassifier(model)
    pictures = images.take(images.n_images).images
    before = classifier.keep_probability(pictures)
    shift_policy(model, images, blocks)
    after = classifier.keep_probability(pictures)
    assert (after >= 0.5).sum(axis=1).mean() == pytest.approx(blocks, abs=0.01)  # two bits of 768 may tie
    shift = np.log(after / (1 - after)) - np.log(before / (1 - before))
    np.testing.assert_allclose(shift, shift[0, 0], atol=1e-4)


@pytest.mark.parametrize(("blocks", "has_policy"), [(3, True), (1, False)])
def test_shift_that_cannot_be_is_refused(
    blocks: float, has_policy: bool, random_model: Callable[..., BlockDropModel], place: Callable[..., Place]
) -> None:
    expected = "less than the model's 3" if has_policy else "only a policy network can be shifted"
    with pytest.raises(UsageError, match=expected):
        shift_policy(random_model("resnet8", has_policy=has_policy), place().train, blocks)

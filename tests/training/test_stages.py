from collections.abc import Callable

import pytest
import torch

from bdtool.errors import UsageError
from bdtool.models.model import BlockDropModel
from bdtool.training.options import CurriculumOptions
from bdtool.training.stages import Place, curriculum, start_from_trunk


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

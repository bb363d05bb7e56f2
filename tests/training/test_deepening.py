"""Deeper bases from shallower ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bdtool.errors import UsageError
from bdtool.models.checkpoints import import_checkpoint
from bdtool.models.model import BlockDropModel
from bdtool.runtime.preprocess import preprocess
from bdtool.training.deepening import block_sources, deepen
from tests.conftest import LabelledImages


def test_first_block_of_a_stage_stays_and_the_others_are_repeated_evenly() -> None:
    assert block_sources((3, 3), (7, 3)) == [0, 1, 1, 1, 2, 2, 2, 3, 4, 5]
    assert block_sources((5,), (10,)) == [0, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert block_sources((1, 2), (1, 2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("shallow", "arch", "last"), [("resnet14", "resnet26", "bn2"), ("resnet50", "resnet101", "bn3")]
)
def test_repeated_blocks_share_the_residual_of_their_source(
    shallow: str, arch: str, last: str, random_model: Callable[..., BlockDropModel]
) -> None:
    start = random_model(shallow)
    deeper = deepen(start, arch)
    assert deeper.policy is None
    assert deeper.spec.arch == arch
    assert deeper.spec.provenance["start"] == start.spec.provenance
    for name in ("stem", "head"):
        _assert_same(getattr(deeper.base, name).state_dict(), getattr(start.base, name).state_dict())
    sources = block_sources(start.spec.architecture.stages, deeper.spec.architecture.stages)
    for block, source in zip(deeper.base.blocks, sources, strict=True):
        found, expected = block.state_dict(), start.base.blocks[source].state_dict()
        for parameter in (f"{last}.weight", f"{last}.bias"):
            expected[parameter] = expected[parameter] / sources.count(source)
        _assert_same(found, expected)


def test_deepened_public_checkpoint_is_nearly_as_good_without_training(
    checkpoints_dir: Path, cifar10_test: LabelledImages
) -> None:
    shallow = import_checkpoint(checkpoints_dir / "resnet32-d509ac18.th", arch="resnet32")
    pixels = torch.from_numpy(preprocess(cifar10_test.images[:500], shallow.spec.preprocessing))
    labels = torch.from_numpy(cifar10_test.labels[:500])

    def accuracy(model: BlockDropModel) -> float:
        with torch.no_grad():
            return float((model(pixels).argmax(1) == labels).float().mean())

    assert accuracy(deepen(shallow, "resnet56")) > accuracy(shallow) - 0.03
    assert accuracy(deepen(shallow, "resnet110")) > accuracy(shallow) - 0.08


@pytest.mark.parametrize(
    ("shallow", "arch", "message"),
    [
        (
            "resnet14",
            "resnet18",
            "resnet18 has basic blocks of 64, 128, 256, 512 channels .imagenet., resnet14 basic blocks of 16",
        ),
        ("resnet14", "resnet14", "resnet14 has 2, 2, 2 blocks, resnet14 2, 2, 2; give an architecture with more"),
        ("resnet14", "resnet8", "resnet14 has 2, 2, 2 blocks, resnet8 1, 1, 1; give an architecture with more"),
        ("resnet8", "resnet14", "the first block of a stage is not repeated, and there is no other. Give a MODEL with"),
        ("resnet14", "resnet21", "unknown architecture 'resnet21'"),
    ],
)
def test_architecture_that_does_not_go_on_is_refused(
    shallow: str, arch: str, message: str, random_model: Callable[..., BlockDropModel]
) -> None:
    with pytest.raises(UsageError, match=message):
        deepen(random_model(shallow), arch)


def test_base_that_was_trained_for_a_mask_is_refused(random_model: Callable[..., BlockDropModel]) -> None:
    with pytest.raises(UsageError, match=r"trained for the mask 101100 alone, so that its other blocks are no start"):
        deepen(random_model("resnet14", has_policy=False, mask="101100"), "resnet20")


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=0, rtol=0)

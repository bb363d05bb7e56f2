"""A minute of real learning: CIFAR-10 pictures and the shipped base."""

from typing import Any

import numpy as np
import pytest
import torch

from bdtool.data.npz import array_source
from bdtool.models.parts import network_spec
from bdtool.models.shipped import shipped_models
from bdtool.models.store import load_model
from bdtool.training.base_spec import base_spec
from bdtool.training.distributed import Group
from bdtool.training.options import CurriculumOptions, FinetuneOptions, PretrainOptions
from bdtool.training.place import TrainingPlace
from bdtool.training.policy_network import with_policy, without_policy
from bdtool.training.stages import curriculum, finetune, pretrain


@pytest.fixture
def cifar_place(cifar10_test: Any, tmp_path: Any) -> Any:
    """Train on 1,500 of CIFAR-10's test pictures and measure on 500 others: nothing is claimed of the accuracy."""
    network = network_spec(load_model(shipped_models()["r32-cifar10"]))
    parts = []
    for first, stop in ((0, 1500), (1500, 2000)):
        images, labels = cifar10_test.images[first:stop], cifar10_test.labels[first:stop].astype(np.int64)
        options = {"preprocessing": network.preprocessing, "resize": False, "name": "cifar"}
        parts.append(array_source(images, labels, description="cifar", **options))
    group = Group(rank=0, size=1, device=torch.device("cpu"))
    return lambda name: TrainingPlace(
        train=parts[0], val=parts[1], output=tmp_path / f"{name}.safetensors", group=group
    )


@pytest.mark.slow
def test_curriculum_finds_blocks_to_drop(cifar_place: Any) -> None:
    base = without_policy(load_model(shipped_models()["r32-cifar10"]))
    options = CurriculumOptions(epochs=5, batch=100, gamma=1.0, lr=3e-3, entropy=0.0, stage_epochs=0.1, stage_blocks=5)
    trained = curriculum(base, options, cifar_place("policy"))
    first, last = trained.epochs[1], trained.epochs[-1]  # from the second on all blocks are learned
    assert last.reward > first.reward + 0.05
    assert last.blocks_mean < first.blocks_mean - 0.5
    assert trained.figures["blocks_mean"] < base.n_blocks - 1


@pytest.mark.slow
def test_finetuning_learns_base_and_policy_together(cifar_place: Any) -> None:
    start = with_policy(without_policy(load_model(shipped_models()["r32-cifar10"])), seed=0)
    options = FinetuneOptions(epochs=3, batch=50, gamma=0.5, lr=3e-3, base_lr=0.01, schedule="constant")
    trained = finetune(start, options, cifar_place("model"))
    first, last = trained.epochs[0], trained.epochs[-1]
    assert last.reward > first.reward + 0.05
    assert last.blocks_mean < first.blocks_mean - 0.5
    assert last.accuracy > first.accuracy, "the base learns to do with fewer blocks"


@pytest.mark.slow
def test_pretraining_learns(cifar_place: Any) -> None:
    options = PretrainOptions(epochs=5, batch=50, lr=0.05)
    trained = pretrain(base_spec("resnet8", data="cifar10:"), options, cifar_place("base"))
    assert trained.epochs[-1].loss < trained.epochs[0].loss - 0.2
    assert trained.figures["accuracy"] > 0.25, "ten classes: chance is 0.1"

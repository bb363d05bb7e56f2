"""A base for other classes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bdtool.data.npz import array_source
from bdtool.errors import DataError, UsageError
from bdtool.models.architectures import architecture
from bdtool.models.checkpoints import import_checkpoint
from bdtool.models.model import BlockDropModel
from bdtool.training.base_spec import classes_of
from bdtool.training.distributed import Group
from bdtool.training.options import FinetuneOptions
from bdtool.training.place import TrainingPlace
from bdtool.training.stages import finetune
from bdtool.training.transfer import transfer
from tests.conftest import LabelledImages


def test_mask_that_the_base_was_trained_for_stays(random_model: Callable[..., BlockDropModel]) -> None:
    """Only its blocks have learned anything of late."""
    start = random_model("resnet8", has_policy=False, mask="101")
    assert transfer(start, n_classes=3).spec.mask == "101"


@pytest.mark.parametrize("arch", ["resnet14", "resnet18"])
def test_all_but_the_last_layer_stays(arch: str, random_model: Callable[..., BlockDropModel]) -> None:
    start = random_model(arch, has_policy=True)
    found = transfer(start, n_classes=3, labels=("a", "b", "c"))
    assert (found.spec.n_classes, found.spec.labels, found.spec.arch) == (3, ("a", "b", "c"), arch)
    assert found.spec.preprocessing == start.spec.preprocessing
    assert found.policy is None
    assert found.spec.provenance["start"] == start.spec.provenance
    images = torch.randn(2, 3, start.spec.preprocessing.height, start.spec.preprocessing.width)
    with torch.no_grad():
        assert found(images).shape == (2, 3)
        for part in ("stem", "blocks"):
            old, new = (getattr(model.base, part).state_dict() for model in (start, found))
            assert old.keys() == new.keys()
            assert all(torch.equal(old[name], new[name]) for name in old)


def test_seed_makes_the_last_layer(random_model: Callable[..., BlockDropModel]) -> None:
    weights = [transfer(random_model("resnet8"), n_classes=4, seed=seed).base.head.linear.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_trained_base_learns_other_classes_from_few_images(
    checkpoints_dir: Path, cifar10_test: LabelledImages, tmp_path: Path, random_model: Callable[..., BlockDropModel]
) -> None:
    """Pairs of CIFAR-10's classes, 800 pictures of them: from random weights they are too few."""
    trained = import_checkpoint(checkpoints_dir / "resnet20-12fca82f.th", arch="resnet20")
    options = {"preprocessing": trained.spec.preprocessing, "resize": False, "name": "pairs", "description": "pairs"}
    train, val = (
        array_source(cifar10_test.images[part], cifar10_test.labels[part].astype(np.int64) // 2, **options)
        for part in (slice(800), slice(800, 1300))
    )
    group = Group(rank=0, size=1, device=torch.device("cpu"))

    def accuracy(start: BlockDropModel, name: str) -> float:
        where = TrainingPlace(train=train, val=val, output=tmp_path / f"{name}.safetensors", group=group)
        few = FinetuneOptions(policy="all", epochs=2, batch=50, base_lr=0.01)
        return finetune(transfer(start, n_classes=5), few, where).figures["accuracy"]

    assert accuracy(random_model("resnet20"), "random") < 0.6
    assert accuracy(trained, "trained") > 0.75


def test_data_says_what_classes_there_are(tmp_path: Path) -> None:
    for name in ("cat", "owl"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.png").touch()
    layout = architecture("resnet18")
    assert classes_of(str(tmp_path / "train"), layout) == (2, ("cat", "owl"))
    assert classes_of("cifar100:data", layout) == (100, None)
    assert classes_of("train.npz", layout, n_classes=7) == (7, None)
    (tmp_path / "train.npz").touch()
    with pytest.raises(UsageError, match=r"train\.npz: does not say how many classes there are; give --classes N"):
        classes_of(str(tmp_path / "train.npz"), layout)
    with pytest.raises(DataError, match=r"folders train look like splits, expected classes\. Pass one of them"):
        classes_of(str(tmp_path), layout)
    with pytest.raises(UsageError, match="'nowhere': no such file, directory or data set"):
        classes_of("nowhere", layout)

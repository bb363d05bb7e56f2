"""CIFAR and ImageNet as torchvision lays them out: read as by torchvision, or said what is missing."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from bdtool.data import torchvision_sets
from bdtool.data.sources import open_data
from bdtool.errors import DataError
from bdtool.specs import NetworkSpec
from tests.data.sets import NETWORK, UNNAMED, X, folders, npz


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of four images in torchvision's own layout, with its digests switched off."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = np.arange(4 * 3072, dtype=np.uint32).astype(np.uint8).reshape(4, 3072)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": [3, 1, 4, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    return tmp_path


def cifar_network(n_classes: int = 10) -> NetworkSpec:
    preprocessing = dataclasses.replace(NETWORK.preprocessing, height=32, width=32)
    return dataclasses.replace(UNNAMED, n_classes=n_classes, preprocessing=preprocessing)


def test_cifar10_equals_torchvision(cifar_root: Path) -> None:
    oracle = datasets.CIFAR10(cifar_root, train=False)
    source = open_data(f"cifar10:{cifar_root}", network=cifar_network())
    assert source.name == "cifar10-test"
    batch = source.take(4)
    np.testing.assert_array_equal(batch.images, np.stack([np.asarray(image) for image, _ in oracle]))
    np.testing.assert_array_equal(batch.labels, [3, 1, 4, 9])


def test_training_images_of_cifar10_are_read_where_they_are_asked_for(
    cifar_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    rows = {"data": np.full((2, 3072), 7, np.uint8), "labels": [5, 6]}
    (cifar_root / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(rows))
    batch = open_data(f"cifar10:{cifar_root}", network=cifar_network(), split="train").take(2)
    np.testing.assert_array_equal(batch.labels, [5, 6])
    assert (batch.images == 7).all()


def test_parts_of_a_data_set_share_no_images(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "train_list", datasets.CIFAR10.test_list)
    data, network = f"cifar10:{cifar_root}", cifar_network()
    train, test, again = (open_data(data, network=network, split=split) for split in ("train", "test", "test"))
    assert not train.shared_with(test).any()
    assert again.shared_with(test).all()


def test_unpacked_cifar10_may_be_given_itself(cifar_root: Path) -> None:
    """Under whatever name: what `--data DIR` with its files in it is told to be is then true."""
    folder = (cifar_root / "cifar-10-batches-py").rename(cifar_root / "mine")
    (folder / "data_batch_1").touch()
    assert open_data(f"cifar10:{folder}", network=cifar_network()).n_images == 4


def test_data_set_that_is_not_there_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(datasets.CIFAR10, "download", asked.append)
    with pytest.raises(DataError, match="data set not found"):
        open_data(f"cifar10:{tmp_path}", network=cifar_network())
    assert asked == []


def test_cifar_for_a_model_of_other_classes_is_refused(cifar_root: Path) -> None:
    with pytest.raises(DataError, match="cifar10: has 10 classes, the model has 3"):
        open_data(f"cifar10:{cifar_root}", network=cifar_network(3))


@pytest.mark.parametrize(
    ("name", "n_classes", "layout"),
    [("cifar10", 10, "cifar-10-batches-py"), ("cifar100", 100, "cifar-100-python"), ("imagenet", 1000, "n01440764")],
)
def test_missing_files_name_the_expected_layout(tmp_path: Path, name: str, n_classes: int, layout: str) -> None:
    with pytest.raises(DataError, match=layout):
        open_data(f"{name}:{tmp_path}", network=cifar_network(n_classes))


def imagenet(root: Path) -> str:
    wnids = ["n01440764", "n01443537", "n01484850"]
    torch.save(({wnid: (wnid,) for wnid in wnids}, ["n01440764"]), root / "meta.bin")
    folders(root / "val", *(f"{wnid}/x.png" for wnid in wnids))
    return f"imagenet:{root}"


def test_imagenet_reads_the_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torchvision_sets.N_CLASSES, "imagenet", 3)
    source = open_data(imagenet(tmp_path), network=UNNAMED)
    assert source.name == "imagenet-val"
    batch = source.take(3)
    np.testing.assert_array_equal(batch.labels, [0, 1, 2])
    np.testing.assert_array_equal(batch.images, X[:3])
    assert batch.names[0] == "val/n01440764/x.png"


def test_imagenet_reads_the_training_split_where_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torchvision_sets.N_CLASSES, "imagenet", 3)
    data = imagenet(tmp_path)
    (tmp_path / "val").rename(tmp_path / "train")
    assert open_data(data, network=UNNAMED, split="train").take(3).names[0] == "train/n01440764/x.png"


@pytest.mark.parametrize("missing", ["meta.bin", "val"])
def test_archives_of_imagenet_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    data = imagenet(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    monkeypatch.setattr(datasets, "ImageNet", lambda *args, **kwargs: pytest.fail("opened"))
    with pytest.raises(DataError, match="files are missing"):
        open_data(data, network=cifar_network(1000))


def test_imagenet_with_missing_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 3 class folders"):
        open_data(imagenet(tmp_path), network=cifar_network(1000))


@pytest.mark.parametrize("n_bytes", [0, 5, 500])
def test_list_of_imagenets_classes_that_is_cut_short_is_named(tmp_path: Path, n_bytes: int) -> None:
    data = imagenet(tmp_path)
    (tmp_path / "meta.bin").write_bytes((tmp_path / "meta.bin").read_bytes()[:n_bytes])
    with pytest.raises(DataError, match=r"imagenet:.*\. Expected .*meta\.bin and 1000 class folders"):
        open_data(data, network=cifar_network(1000))


@pytest.mark.parametrize("folder", ["val/n00000000", "val/n01440764"])
def test_folders_of_imagenet_that_hold_something_else_are_named(tmp_path: Path, folder: str) -> None:
    data = imagenet(tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    for file in (tmp_path / folder).iterdir():
        file.rename(tmp_path / "elsewhere.png")
    with pytest.raises(DataError, match=r"imagenet:.*\. Expected .*meta\.bin and 1000 class folders"):
        open_data(data, network=cifar_network(1000))


def test_torchvision_is_not_loaded_for_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it now fails
    assert open_data(npz(tmp_path, x=X), network=NETWORK).n_images == 5

"""Directories of images: which folder is which class, and what is refused."""

from __future__ import annotations

import dataclasses
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from torchvision import datasets
from torchvision.models._meta import _IMAGENET_CATEGORIES

from bdtool.data.sources import class_names, open_data
from bdtool.errors import DataError, UsageError
from bdtool.specs import NetworkSpec
from tests.data.sets import NETWORK, UNNAMED, X, folders


def test_class_folders_are_matched_by_label(tmp_path: Path) -> None:
    source = open_data(folders(tmp_path, "ant/a.png", "cat/b.png", "dog/deep/c.PNG"), network=NETWORK)
    batch = source.take(3)
    np.testing.assert_array_equal(batch.labels, [1, 0, 2])
    np.testing.assert_array_equal(batch.images, X[:3])
    assert batch.names == ("ant/a.png", "cat/b.png", "dog/deep/c.PNG")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("dog/a.png", "cat/deep/b.png", ".hidden/c.png", "__MACOSX/d.png"), ("cat", "dog")),
        (("cat/.a.png", "dog/.b.png"), None),
        (("train/a.png", "test/b.png"), None),
        (("a.png",), None),
    ],
)
def test_only_folders_with_images_name_classes(
    tmp_path: Path, names: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    assert class_names(folders(tmp_path, *names)) == expected


def test_folder_without_images_is_no_class_to_train(tmp_path: Path) -> None:
    """A network would never be shown anything of it; torchvision's ImageFolder refuses it, too."""
    root = folders(tmp_path, "dog/a.png", "cat/b.png")
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match=r"no image in folders notes\. Remove them"):
        class_names(root)


def test_folder_without_images_needs_no_label(tmp_path: Path) -> None:
    root = folders(tmp_path, "dog/a.png", "cat/b.png")
    (tmp_path / "ant").mkdir()
    (tmp_path / "notes").mkdir()
    np.testing.assert_array_equal(open_data(root, network=NETWORK).labels, [0, 2])
    with pytest.raises(DataError, match=r"got 4 class folders \(ant, notes without an image\), the model has 3"):
        open_data(root, network=UNNAMED)


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    """As torchvision follows them, which does not end where a link leads back up."""
    root = Path(folders(tmp_path / "set", "cat/a.png", "dog/b.png"))
    folders(tmp_path / "more", "c.png", "deep/d.png")
    (root / "cat" / "linked").symlink_to(tmp_path / "more")
    (root / "dog" / "linked").symlink_to("../../more/deep")
    oracle = datasets.ImageFolder(root)
    expected = ("cat/a.png", "cat/linked/c.png", "cat/linked/deep/d.png", "dog/b.png", "dog/linked/d.png")
    assert tuple(str(Path(path).relative_to(root)) for path, _ in oracle.samples) == expected
    (root / "cat" / "up").symlink_to(root / "cat")
    (tmp_path / "more" / "back").symlink_to(root / "cat")
    (root / "dog" / "root").symlink_to(root)
    (root / "dog" / "itself").symlink_to("itself")
    source = open_data(str(root), network=NETWORK)
    assert source.names == expected
    np.testing.assert_array_equal(source.labels, [0, 0, 0, 2, 2])


@pytest.mark.parametrize("data", ["train", "train/", ".", "train/../train"])
def test_a_folder_is_called_by_its_name_whatever_its_images_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    """A file may be called NAME[0], as images of an .npz are."""
    folders(tmp_path / "train", "ant/cat [1].png", "dog/b.png")
    monkeypatch.chdir(tmp_path / "train" if data == "." else tmp_path)
    source = open_data(data, network=NETWORK)
    assert source.name == source.drawn(1).name == "train"


def test_some_of_the_classes_are_enough_when_named(tmp_path: Path) -> None:
    batch = open_data(folders(tmp_path, "dog/a.png"), network=NETWORK).take(1)
    np.testing.assert_array_equal(batch.labels, [2])


def test_upper_case_and_the_form_of_accents_do_not_hide_a_label(tmp_path: Path) -> None:
    network = dataclasses.replace(NETWORK, labels=("café", "Ant", "ant"))
    decomposed = unicodedata.normalize("NFD", "CAFÉ")
    source = open_data(folders(tmp_path, f"{decomposed}/a.png", "ant/b.png", "Ant/c.png"), network=network)
    assert source.names == ("Ant/c.png", f"{decomposed}/a.png", "ant/b.png")
    np.testing.assert_array_equal(source.labels, [1, 0, 2])
    with pytest.raises(DataError, match="class folders Cat, cat are all the label cat, expected one folder for each"):
        open_data(folders(tmp_path / "twice", "Cat/a.png", "cat/b.png", "dog/c.png"), network=NETWORK)


def test_classes_without_names_count_alphabetically(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batch = open_data(folders(tmp_path, "a/a.png", "b/b.png", "c/c.png"), network=UNNAMED).take(3)
    np.testing.assert_array_equal(batch.labels, [0, 1, 2])
    assert not caplog.messages


_IMAGENETTE = {  # a subset of ImageNet, and what torchvision calls its classes
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def test_some_of_imagenets_ids_are_enough_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = tuple(_IMAGENET_CATEGORIES)
    network = dataclasses.replace(NETWORK, n_classes=1000, labels=labels)
    source = open_data(folders(tmp_path, *(f"{name}/a.png" for name in _IMAGENETTE)), network=network)
    assert [labels[number] for number in source.labels] == list(_IMAGENETTE.values())
    (said,) = caplog.messages
    assert said == (
        f"{tmp_path}: class folders are not named after the model's labels, and taken as WordNet ids: n01440764 is "
        "tench, n02102040 is English springer, n02979186 is cassette player, n03888257 is parachute"
    )
    folders(tmp_path, "n00000001/a.png")
    with pytest.raises(DataError, match=r"no class folder \(n00000001, .* has the name of a label of the model"):
        open_data(str(tmp_path), network=network)  # of the whole WordNet, or of ImageNet-21k
    (tmp_path / "n00000001" / "a.png").unlink()
    (tmp_path / "n00000001").rmdir()
    with pytest.raises(DataError, match=r"no class folder .* has the name of a label of the model"):
        open_data(str(tmp_path), network=NETWORK)  # which has three classes


def test_numbers_of_all_classes_are_read_as_numbers_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Class 10 is folder 10; in alphabetical order it would be the third."""
    network = dataclasses.replace(NETWORK, n_classes=12, labels=tuple("abcdefghijkl"))
    source = open_data(folders(tmp_path, *(f"{k}/x.png" for k in range(12))), network=network)
    assert source.labels.tolist() == [int(name.partition("/")[0]) for name in source.names]
    assert caplog.messages[0].endswith("taken as class numbers: 0 is a, 1 is b, 2 is c, 11 is l")


_SOME_IDS = ("n01440764", "n01443537", "n01484850")  # as many as the network has classes, which are none of ImageNet's


@pytest.mark.parametrize("names", [("bird", "car", "plane"), ("1", "2", "3"), ("0", "1"), _SOME_IDS])
def test_no_folder_named_after_a_label_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    """In alphabetical order they would count as other classes: an accuracy of something else."""
    with pytest.raises(DataError) as said:
        open_data(folders(tmp_path, *(f"{name}/a.png" for name in names)), network=NETWORK)
    shown = f"no class folder ({', '.join(names)}) has the name of a label of the model (cat, ant, dog). Rename"
    assert shown in str(said.value)


@pytest.mark.parametrize(
    ("names", "network", "why"),
    [
        (("bird", "car", "plane"), NETWORK, "no class folder (bird, car, plane) has the name of a label of the model"),
        (
            ("ant", "dgo"),
            NETWORK,
            "class folders dgo are not among the model's labels (cat, ant, dog), while others are.",
        ),
        (("Cat", "cat"), NETWORK, "class folders Cat, cat are all the label cat, expected one folder for each."),
        (("a", "b"), UNNAMED, "got 2 class folders, the model has 3 classes without names."),
    ],
)
def test_images_of_other_folders_have_no_labels_where_these_are_optional(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], network: NetworkSpec, why: str
) -> None:
    root = folders(tmp_path, *(f"{name}/a.png" for name in names))
    source = open_data(root, network=network, labels="optional")
    assert not source.has_labels
    assert source.names == tuple(f"{name}/a.png" for name in names)
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path}: {why}")
    assert said.endswith(". Its images are taken without labels")
    with pytest.raises(DataError, match=r"; or classify the images without labels: `bdtool run BUNDLE IMAGE\.\.\.`"):
        open_data(root, network=network)


def test_optional_labels_are_taken_where_they_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_data(folders(tmp_path / "set", "dog/a.png"), network=NETWORK, labels="optional")
    np.testing.assert_array_equal(source.labels, [2])
    assert not caplog.messages
    with pytest.raises(DataError, match="folders test, train look like splits"):
        open_data(folders(tmp_path / "splits", "train/a.png", "test/b.png"), network=NETWORK, labels="optional")


def test_folders_agree_with_torchvision(tmp_path: Path) -> None:
    root = folders(tmp_path, "n02/b.png", "n02/a.png", "n01/z.png", "n03/c.png")
    oracle = datasets.ImageFolder(root)
    batch = open_data(root, network=UNNAMED).take(9)
    np.testing.assert_array_equal(batch.labels, oracle.targets)
    assert [str(Path(root, name)) for name in batch.names] == [path for path, _ in oracle.samples]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ant/a.png", "cat/b.png", "dgo/c.png"), "class folders dgo are not among the model's labels"),
        (("train/ant/a.png", "test/cat/b.png"), "folders test, train look like splits"),
        (("a.png", "ant/b.png"), "1 images beside folders with images"),
    ],
)
def test_folders_that_do_not_match_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(folders(tmp_path, *names), network=NETWORK)


def test_another_number_of_folders_than_of_classes_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 2 class folders, the model has 3 classes without names"):
        open_data(folders(tmp_path, "a/a.png", "b/b.png"), network=UNNAMED)


def test_folder_named_after_an_ambiguous_label_is_refused(tmp_path: Path) -> None:
    network = dataclasses.replace(NETWORK, labels=("crane", "crane", "ant"))
    with pytest.raises(DataError, match="class folders crane are not among"):
        open_data(folders(tmp_path, "ant/a.png", "crane/b.png"), network=network)


def test_directory_of_images_has_no_labels(tmp_path: Path) -> None:
    source = open_data(folders(tmp_path, "b.png", "a.png"), network=NETWORK)
    (tmp_path / "notes.txt").write_text("not an image")
    assert source.take(2).names == ("a.png", "b.png")
    assert not source.has_labels


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(DataError, match=r"no images in it, expected files named .*\.png"):
        open_data(str(tmp_path), network=NETWORK)


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["test.npz"], "test", r"no images in it; it holds test\.npz; pass the file itself: .*/test\.npz$"),
        (["test.npz", "train.npz"], "train", r"it holds test\.npz, train\.npz; pass the file itself: .*/train\.npz$"),
        (["a.npz", "b.npz", "c.npz", "d.npz"], "test", r"it holds a\.npz, b\.npz, c\.npz, \.\.\.; .*/a\.npz$"),
        (["data_batch_1", "test_batch"], "test", r"it holds cifar10's own files; pass cifar10:"),
        (["train", "test", "meta"], "test", r"it holds cifar100's own files; pass cifar100:"),
        (["cifar-10-batches-py/data_batch_1"], "test", r"it holds cifar-10-batches-py; pass cifar10:"),
        (["cifar-10-python.tar.gz"], "test", r"unpack that there \(tar -xzf\), then pass cifar10:"),
        (["data_batch_1.bin"], "test", r"binary version; cifar10:ROOT reads the Python version"),
    ],
)
def test_directory_of_other_data_says_what_to_pass(
    tmp_path: Path, files: list[str], split: Literal["train", "test"], message: str
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UsageError, match=message):
        open_data(str(tmp_path), network=NETWORK, split=split)

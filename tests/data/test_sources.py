"""Every form of DATA opens as the same kind of source, or says what is wrong with it."""

from __future__ import annotations

import errno
import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bdtool.data import folders as folder_files
from bdtool.data.sources import ImageSource, open_data
from bdtool.errors import DataError, UsageError
from tests.data.sets import NETWORK, X, Y, all_images, folders, npz


def test_npz_gives_its_images_and_labels(tmp_path: Path) -> None:
    source = open_data(npz(tmp_path, x=X, y=Y.astype(np.uint8)), network=NETWORK)
    batch = source.take(5)
    np.testing.assert_array_equal(batch.images, X)
    np.testing.assert_array_equal(batch.labels, Y)
    assert batch.labels is not None
    assert batch.labels.dtype == np.int64
    assert batch.names[4] == "set.npz[4]"
    assert (source.n_images, source.has_labels, source.is_real) == (5, True, True)
    assert source.name == source.drawn(2).name == "set.npz"


def test_npz_without_labels_has_none(tmp_path: Path) -> None:
    source = open_data(npz(tmp_path, x=X), network=NETWORK)
    assert not source.has_labels
    assert source.take(1).labels is None


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_keep_order_and_lose_nothing(tmp_path: Path, batch_size: int) -> None:
    source = open_data(npz(tmp_path, x=X, y=Y), network=NETWORK)
    np.testing.assert_array_equal(all_images(source, batch_size), X)
    np.testing.assert_array_equal(all_images(source, batch_size), X)  # and a second walk starts again


def test_drawn_images_are_spread_over_the_set(tmp_path: Path) -> None:
    source = open_data(npz(tmp_path, x=X, y=Y), network=NETWORK, resize=False)
    drawn = source.drawn(3, seed=0)
    rows = [source.names.index(name) for name in drawn.names]
    assert rows == sorted(set(rows))
    batch = drawn.take(3)
    np.testing.assert_array_equal(batch.images, X[rows])
    assert batch.labels is not None
    np.testing.assert_array_equal(batch.labels, Y[rows])
    np.testing.assert_array_equal(batch.rows, rows)  # by which a POLICY file has its row
    assert drawn.description == f"{source.description}, drawn from 5 images with seed 0"
    assert len({tuple(source.drawn(3, seed=seed).names) for seed in range(20)}) > 1
    assert source.drawn(5, seed=0) is source.drawn(None) is source
    with pytest.raises(ValueError, match="n_images must be at least 1; got 0"):
        source.drawn(0)


def test_a_sample_of_a_sample_knows_the_numbers_in_the_whole_set(tmp_path: Path) -> None:
    source = open_data(npz(tmp_path, x=X, y=Y), network=NETWORK)
    batch = source.drawn(4, seed=1).drawn(2).take(9)
    np.testing.assert_array_equal(batch.images, X[batch.rows])
    assert len(batch.rows) == 2
    assert source.take(9).rows.tolist() == [0, 1, 2, 3, 4]


def test_what_a_sample_leaves_is_a_set_of_its_own(tmp_path: Path) -> None:
    data = npz(tmp_path, x=X, y=Y)
    source = open_data(data, network=NETWORK)
    sample = source.drawn(2)
    assert source.shared_with(sample).tolist() == [row in sample.numbers for row in range(5)]
    rest = source.without(sample, description="the rest")
    batch = rest.take(9)
    assert set(batch.rows) == set(range(5)) - set(sample.numbers)
    np.testing.assert_array_equal(batch.images, X[batch.rows])
    np.testing.assert_array_equal(batch.labels, Y[batch.rows])
    assert rest.drawn(2).description == "the rest, drawn from 3 images with seed 0"
    assert not rest.drawn(2).shared_with(sample).any()
    for link, leads_to in (("link", tmp_path), ("other.npz", data)):
        (tmp_path / link).symlink_to(leads_to)
    for again in (tmp_path / "link" / Path(data).name, tmp_path / "other.npz"):
        same = open_data(str(again), network=NETWORK)
        assert same.shared_with(sample).sum() == 2  # it is the same set, whatever leads there
    made = [open_data(f"synthetic:5:{seed}", network=NETWORK) for seed in (0, 1)]
    assert not made[0].shared_with(sample).any()
    assert not made[0].shared_with(made[1]).any()  # as many, but others
    assert made[0].shared_with(made[0].drawn(2)).sum() == 2
    with pytest.raises(DataError, match="the rest: no images"):
        source.without(source, description="the rest")


def test_a_smaller_sample_is_of_the_images_of_a_larger_one() -> None:
    source = open_data("synthetic:200", network=NETWORK)
    larger = source.drawn(120)
    assert larger.drawn(50).take(50).rows.tolist() == source.take(50).rows.tolist()
    assert set(source.take(50).rows) < set(larger.take(120).rows)
    assert larger.drawn(50).description == source.drawn(50).description
    counts = np.bincount(np.concatenate([source.drawn(20, seed=s).take(20).rows for s in range(300)]), minlength=200)
    assert 10 < counts.min() <= counts.max() < 55  # 30 on average: each image as often as another


def test_take_draws_what_a_sample_is(tmp_path: Path) -> None:
    source = open_data(npz(tmp_path, x=X, y=Y), network=NETWORK)
    assert source.take(2).names == tuple(source.drawn(2).names)
    assert len(source.take(99).images) == 5


def test_sample_gives_pictures_in_their_own_size(tmp_path: Path) -> None:
    """Training crops them anew in each epoch; what is in memory has one size only."""
    source = open_data(folders(tmp_path, *(f"cat/{index}.png" for index in range(5))), network=NETWORK)
    for index in range(5):
        Image.new("RGB", (9 + index, 12), (index, 0, 0)).save(tmp_path / "cat" / f"{index}.png")
    sample = source.drawn(2)
    assert sample.picture_at is not None
    for index, row in enumerate(sample.numbers.tolist()):
        picture = sample.picture_at(index)
        assert picture.shape == (12, 9 + row, 3)
        assert picture[0, 0, 0] == row
    assert open_data(npz(tmp_path, x=X), network=NETWORK).drawn(2).picture_at is None


def test_sample_of_class_folders_has_all_classes_and_reads_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{label}/{index:02}.png" for label in ("cat", "ant", "dog") for index in range(20)]
    source = open_data(folders(tmp_path, *names), network=NETWORK)
    read: list[str] = []
    real = folder_files.read_image
    monkeypatch.setattr(
        folder_files, "read_image", lambda path: read.append(path.relative_to(tmp_path).as_posix()) or real(path)
    )
    sample = source.drawn(12)
    assert read == []
    batches = list(sample.batches(5))
    assert sorted(read) == sorted(sample.names) == list(sample.names)
    assert {int(label) for batch in batches for label in batch.labels} == {0, 1, 2}


def test_batches_refuse_sizes_below_one(tmp_path: Path) -> None:
    source = open_data(npz(tmp_path, x=X), network=NETWORK)
    with pytest.raises(ValueError, match="at least 1"):
        source.batches(0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": X}, "no array 'x'"),
        ({"x": X.astype(np.float32)}, r"array 'x': got float32 \[5, 8, 8, 3\], expected uint8"),
        ({"x": X.transpose(0, 3, 1, 2)}, r"save x\.transpose\(0, 2, 3, 1\)"),
        ({"x": X[0]}, r"save x\[None\]"),
        ({"x": X[0, 0, 0]}, r"array 'x': got uint8 \[3\], expected uint8"),
        ({"x": X[:0]}, "no images"),
        ({"x": X[:, :0]}, "array 'x'"),
        ({"x": X, "y": Y[:4]}, r"array 'y': got int64 \[4\], expected whole numbers \[5\]"),
        ({"x": X, "y": Y.astype(float)}, "array 'y': got float64"),
        ({"x": X, "y": Y + 1}, "label 3 of image 2 is not in 0 to 2"),
        ({"x": X, "y": Y + 1}, "`bdtool train pretrain --classes N` makes a model of N classes"),
        ({"x": X, "y": Y - 1}, "label -1 of image 0 is not in 0 to 2"),
        ({"x": np.array([None, "a"])}, "not a readable .npz file"),
        ({"x": X[:, :6]}, r"set\.npz\[0\]: got 8 x 6 pixels, the model takes 8 x 8.*--resize"),
    ],
)
def test_npz_with_unusable_arrays_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(npz(tmp_path, **arrays), network=NETWORK)


def test_npz_of_another_size_is_resized_on_request(tmp_path: Path) -> None:
    source = open_data(npz(tmp_path, x=X[:, :6]), network=NETWORK, resize=True)
    assert all_images(source, 2).shape == (5, 8, 8, 3)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"hello"])
def test_damaged_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"set\.npz: not a readable \.npz file \(it is no zip archive, or cut short\)"):
        open_data(str(path), network=NETWORK)


def test_npz_with_damaged_members_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    for content, message in (
        (b"\x93NUMPY\x01\x00\x02\x00{[", "not a readable"),
        (b"hello", r"array 'x': got \|S5 \[\]"),
    ):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x.npy", content)
        with pytest.raises(DataError, match=rf"set\.npz.*{message}"):
            open_data(str(path), network=NETWORK)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"))
    with pytest.raises(DataError, match=r"not a readable \.npz file \(File 'x\.npy' is encrypted"):
        open_data(str(path), network=NETWORK)


def test_images_are_decoded_only_when_read(tmp_path: Path) -> None:
    source = open_data(folders(tmp_path, "a.png", "b.png"), network=NETWORK)
    (tmp_path / "b.png").write_text("damaged meanwhile")
    batches = source.batches(1)
    assert len(next(batches).images) == 1
    with pytest.raises(DataError, match=r"b\.png"):
        next(batches)


def test_pictures_that_cannot_be_read_are_named_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{index:02}.png" for index in range(40)]
    source = open_data(folders(tmp_path, *names), network=NETWORK)
    for bad in ("05.png", "30.png"):
        (tmp_path / bad).write_text("damaged meanwhile")
    read: list[str] = []
    real = folder_files.read_image
    monkeypatch.setattr(folder_files, "read_image", lambda path: read.append(path.name) or real(path))
    with pytest.raises(DataError) as said:
        list(source.batches(4))
    first, *others = str(said.value).splitlines()
    assert first == f"{tmp_path}: 2 pictures cannot be taken:"
    assert [line.split(": ")[0] for line in others] == [f"  {tmp_path / bad}" for bad in ("05.png", "30.png")]
    assert {name for name in read if read.count(name) > 1} <= {"04.png", "05.png", "06.png", "07.png"}  # one batch


def test_no_more_than_ten_bad_pictures_are_looked_for(tmp_path: Path) -> None:
    source = open_data(folders(tmp_path, *(f"{index:02}.png" for index in range(20))), network=NETWORK)
    for index in range(1, 20):
        Image.fromarray(X[0, :6]).save(tmp_path / f"{index:02}.png")
    with pytest.raises(DataError, match="10 pictures, and maybe more, cannot be taken:") as said:
        source.take(20)
    assert str(said.value).count("Pass --resize") == 10


def test_image_of_another_size_is_refused_when_opening(tmp_path: Path) -> None:
    Image.fromarray(X[0, :6]).save(tmp_path / "small.png")
    with pytest.raises(DataError, match=r"small\.png: got 8 x 6 pixels"):
        open_data(str(tmp_path), network=NETWORK)


def test_synthetic_is_labelled_as_not_real() -> None:
    source = open_data("synthetic:3:7", network=NETWORK)
    assert (source.n_images, source.is_real, source.has_labels) == (3, False, False)
    assert "not real" in source.description
    np.testing.assert_array_equal(source.take(3).images, all_images(source, 2))


def test_synthetic_has_defaults() -> None:
    plain, explicit = (open_data(data, network=NETWORK) for data in ("synthetic", "synthetic:64:0"))
    np.testing.assert_array_equal(plain.take(64).images, explicit.take(64).images)
    assert plain.n_images == 64


@pytest.mark.parametrize("data", ["synthetic:", "synthetic:x", "synthetic:1:2:3", "synthetic:-1"])
def test_malformed_synthetic_is_refused(data: str) -> None:
    with pytest.raises(UsageError, match=r"expected synthetic\[:N\[:SEED\]\]"):
        open_data(data, network=NETWORK)


def test_synthetic_without_images_is_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        open_data("synthetic:0", network=NETWORK)


@pytest.mark.parametrize("data", ["", "mnist:root", "gone.npz", "cifar10:", "cifar10"])
def test_unknown_data_lists_the_forms(data: str) -> None:
    with pytest.raises(UsageError, match=r"FILE\.npz .* cifar10:ROOT, cifar100:ROOT, imagenet:ROOT, synthetic"):
        open_data(data, network=NETWORK)


@pytest.mark.parametrize("data", ["cifar10", "imagenet:"])
def test_data_set_without_its_directory_is_asked_for_it(data: str) -> None:
    with pytest.raises(UsageError, match=r"which directory\? Write (cifar10|imagenet):ROOT\. DATA is one of"):
        open_data(data, network=NETWORK)


def test_file_of_another_kind_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a form of DATA"):
        open_data(str(Path(folders(tmp_path, "a.png"), "a.png")), network=NETWORK)


def test_files_are_decoded_side_by_side_and_stay_in_order(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    both = threading.Barrier(2, timeout=60)  # passed only by two threads at the same time

    def image_at(index: int) -> np.ndarray:
        both.wait()
        return X[index]

    files = ImageSource(
        description="files", is_real=True, names="abcd", labels=None, image_at=image_at, picture_at=image_at
    )
    np.testing.assert_array_equal(files.images_at([2, 0, 1, 3]), X[[2, 0, 1, 3]])
    np.testing.assert_array_equal(all_images(files, 4), X[:4])


def test_npz_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = npz(tmp_path, x=X)

    def denied(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"set\.npz: cannot be read \(Permission denied\); expected x uint8"):
        open_data(data, network=NETWORK)

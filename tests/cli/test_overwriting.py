"""No command writes over what it reads, under whatever name."""

import shutil

import numpy as np
import pytest

from export.files import sha256_of_file


def test_checkpoint_is_not_overwritten_by_its_own_import(bdtool, blockdrop_checkpoint, tmp_path):
    checkpoint = shutil.copy(blockdrop_checkpoint, tmp_path / "c.t7")
    before = sha256_of_file(checkpoint)
    message = bdtool("import", checkpoint, "--arch", "resnet8", "-o", checkpoint, status=2).stderr
    assert "c.t7 is also given as CHECKPOINT, and would be overwritten; choose another name" in message
    assert sha256_of_file(checkpoint) == before


def test_no_command_writes_over_what_it_reads(bdtool, tiny, npz, picture, tmp_path):
    bits = tmp_path / "p.npy"
    np.save(bits, np.array([1, 0, 1]))
    (tmp_path / "link.png").symlink_to(picture)
    for target, name, *words in (
        (picture, "IMAGES...", "run", tiny.bundle, picture, "--json"),
        (tmp_path / "link.png", "IMAGES...", "run", tiny.bundle, picture, "--json"),
        (npz, "--data", "evaluate", tiny.bundle, "--data", npz, "--json"),
        (bits, "--policy", "run", tiny.bundle, picture, "--policy", bits, "--json"),
        (npz, "--data", "report", tiny.bundle, "--data", npz, "-o"),
        (npz, "--val", "train", "finetune", tiny.path, "--data", "cifar10:there", "--val", npz, "--json"),
    ):
        before = sha256_of_file(target)
        extra = ("-o", tmp_path / "new") if words[0] == "train" else ()
        message = bdtool(*words, target, *extra, status=2).stderr
        assert f"{target} is also given as {name}, and would be overwritten; choose another name" in message
        assert sha256_of_file(target) == before


def test_policy_of_many_bits_is_no_file(bdtool, tiny, picture, tmp_path):
    (tmp_path / "old.json").write_text("{}")
    words = ("run", tiny.bundle, picture, "--policy", "01" * 300, "--json", tmp_path / "old.json")
    assert "got 600 bits, the model has 3 blocks" in bdtool(*words, status=2).stderr


def test_text_that_is_no_path_is_not_taken_for_one(bdtool, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("resnet32", "synthetic", "cpu", "all"):
        (tmp_path / name).touch()
    words = ("train", "pretrain", "--arch", "resnet32", "--data", "absent.npz", "-o", "resnet32")
    assert "'absent.npz': no such file" in bdtool(*words, status=2).stderr
    words = ("evaluate", tiny.bundle, "--policy", "all", "--device", "cpu", "--data")
    for name in ("synthetic", "cpu", "all"):
        assert "no labels in 64 synthetic pictures" in bdtool(*words, "synthetic", "--json", name, status=1).stderr


def test_file_of_class_names_is_not_overwritten(bdtool, blockdrop_checkpoint, tmp_path):
    (tmp_path / "names.txt").write_text("precious")
    words = ("import", blockdrop_checkpoint, "--arch", "resnet8", "--labels", tmp_path / "names.txt", "-o")
    assert "names.txt is also given as --labels" in bdtool(*words, tmp_path / "names.txt", status=2).stderr
    assert (tmp_path / "names.txt").read_text() == "precious"


@pytest.mark.parametrize("is_there", [True, False])
def test_one_name_for_two_outputs_is_refused(bdtool, tiny, tmp_path, monkeypatch, is_there):
    monkeypatch.chdir(tmp_path)
    if is_there:
        (tmp_path / "same").write_text("precious")
    training = ("train", "finetune", tiny.path, "--data", "absent.npz")
    for names, *words in (
        ("--html and --json", "profile", tiny.bundle, "--json", "same", "--html", tmp_path / "same"),
        ("-o and --json", *training, "--json", "same", "-o", "same"),
    ):
        assert f"same is given twice: as {names}; choose another" in bdtool(*words, status=2).stderr
    assert (tmp_path / "same").exists() == is_there


def test_directory_of_event_files_is_not_named_as_the_model(bdtool, tiny, tmp_path):
    words = ("train", "finetune", tiny.path, "--data", "absent.npz", "-o", tmp_path / "runs", "--tensorboard")
    assert "runs is given twice: as -o and --tensorboard" in bdtool(*words, tmp_path / "runs", status=2).stderr

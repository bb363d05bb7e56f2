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


def test_weights_in_a_directory_are_not_overwritten_by_their_import(bdtool, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    message = bdtool("import", tmp_path, "-o", tmp_path / "model.safetensors", status=2).stderr
    assert f"model.safetensors lies in {tmp_path}, given as CHECKPOINT, and would be overwritten" in message
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


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


@pytest.fixture
def folders(tmp_path, picture):
    """Ten classes of one picture each."""
    for label in range(10):
        (tmp_path / "folders" / str(label)).mkdir(parents=True)
        shutil.copy(picture, tmp_path / "folders" / str(label) / "00.png")
    return tmp_path / "folders"


def test_no_command_writes_into_a_bundle(bdtool, bundle_copy, tiny, npz, picture, digests):
    before = digests(bundle_copy)
    inside = bundle_copy / "onnx" / "full.onnx"
    for target, name, *words in (
        (inside, "BUNDLE", "fuse", bundle_copy, "-o"),
        (bundle_copy / "new.html", "BUNDLE", "report", bundle_copy, "--data", npz, "-o"),
        (bundle_copy / "engines.json", "BUNDLE", "run", bundle_copy, picture, "--json"),
        (bundle_copy / "manifest.json", "MODEL_OR_BUNDLE", "inspect", bundle_copy, "--json"),
        (bundle_copy / "new.json", "--baseline", "profile", tiny.bundle, "--baseline", bundle_copy, "--json"),
        (bundle_copy / "packed", "BUNDLE", "pack", bundle_copy, "-o"),
    ):
        message = bdtool(*words, target, status=2).stderr
        assert f"{target} lies in {bundle_copy}, given as {name}, which holds its own files alone" in message
    assert digests(bundle_copy) == before


def test_bundle_is_found_under_another_name(bdtool, bundle_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("bundle")
    (tmp_path / "full.onnx").symlink_to("bundle/onnx/full.onnx")
    for given, target in (("link", "bundle/new.onnx"), ("bundle", "link/../bundle/onnx/new"), ("link", "full.onnx")):
        assert f"{target} lies in {given}, given as BUNDLE" in bdtool("fuse", given, "-o", target, status=2).stderr


def test_no_command_writes_over_what_lies_in_a_folder_of_data(bdtool, tiny, folders, digests, tmp_path):
    before = digests(folders)
    target = folders / "3" / "00.png"
    training = ("train", "finetune", tiny.path, "--data", "synthetic", "-o", tmp_path / "new", "--val", folders)
    for name, *words in (
        ("--data", "evaluate", tiny.bundle, "--data", folders),
        ("--eval", "calibrate", tiny.bundle, "--data", "synthetic", "--eval", folders),
        ("--val", *training),
    ):
        message = bdtool(*words, "--json", target, status=2).stderr
        assert f"{target} lies in {folders}, given as {name}, and would be overwritten; choose another name" in message
    assert digests(folders) == before


def test_new_file_in_a_folder_of_data_is_written(bdtool, tiny, folders):
    bdtool("evaluate", tiny.bundle, "--data", folders, "--json", folders / "result.json")
    assert (folders / "result.json").is_file()


def test_no_command_writes_over_the_files_of_a_known_data_set(bdtool, tiny, tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name in ("data_batch_1", "test_batch"):
        (batches / name).write_text("precious")
    for root in (tmp_path, batches):
        words = ("evaluate", tiny.bundle, "--data", f"cifar10:{root}", "--json", batches / "test_batch")
        assert f"test_batch lies in {batches}, given as --data" in bdtool(*words, status=2).stderr
    (tmp_path / "old.json").write_text("{}")  # beside the data set, whatever ROOT is
    words = ("evaluate", tiny.bundle, "--data", f"cifar10:{tmp_path}", "--json", tmp_path / "old.json")
    assert "data set not found or damaged" in bdtool(*words, status=1).stderr


def test_earlier_model_beside_the_event_files_may_be_replaced(bdtool, tiny, tmp_path):
    (tmp_path / "model").touch()
    words = ("train", "finetune", tiny.path, "--data", "absent.npz", "-o", tmp_path / "model")
    assert "'absent.npz': no such file" in bdtool(*words, "--tensorboard", tmp_path, status=2).stderr


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

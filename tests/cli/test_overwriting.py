"""No command writes over what it reads, under whatever name."""

import shutil

import numpy as np

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

"""Options that do not fit what was asked for, and where output may go, before anything is read or computed."""

import os
from pathlib import Path

import pytest


def test_model_is_not_written_into_a_device(bdtool, tiny, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    words = ("train", "finetune", tiny.path, "--data", "none.npz", "-o", tmp_path / "pipe")
    assert "is a device or a pipe, and a MODEL needs a regular file" in bdtool(*words, status=2).stderr


def test_means_that_are_not_of_pixels_from_0_to_1_are_refused(bdtool, tiny, tmp_path):
    words = ("import", tiny.path, "--arch", "resnet20", "--mean", "125,120,110", "-o", tmp_path / "model.safetensors")
    assert "each number must lie between 0 and 1" in bdtool(*words, status=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "--data", "x.npz"), "--data is for counting masks: give --paths or --coverage, too"),
        (("build", "--limit", "5"), "--limit is for counting masks"),
        (("calibrate", "--data", "x.npz", "--percentile", "99"), "--percentile is for --method percentile"),
        (("calibrate", "--data", "x.npz", "--split", "test"), "--split: no effect, as x.npz has one part alone"),
        (
            ("calibrate", "--data", "x.npz", "--precision", "fp16", "--method", "mse", "--no-bias-correction"),
            "--method, --no-bias-correction: no effect, as fp16 parts are typed from the fp32 ones",
        ),
    ],
)
def test_option_that_would_do_nothing_is_refused(bdtool, tiny, words, message):
    command, *others = words
    assert message in bdtool(command, tiny.bundle, *others, status=2).stderr


def test_closed_stderr_stops_nothing(bdtool_json, tiny, npz, monkeypatch):
    """As of a daemon: `2>&-`."""
    monkeypatch.setattr("bdtool.cli.output.sys.stderr", None)
    assert bdtool_json("evaluate", tiny.bundle, "--data", npz)["n_images"] > 0


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (".", "'.' is the directory you are in, and a bundle takes its whole place. Give a directory in it, for"),
        ("..", "'..' holds the directory you are in"),
        ("../here", "'../here' is the directory you are in"),
        ("link", "'link' holds the directory you are in"),
    ],
)
def test_bundle_is_not_made_in_the_place_of_the_directory_one_is_in(bdtool, tiny, tmp_path, monkeypatch, target, told):
    """It would be removed below one's feet."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("link").symlink_to(tmp_path)
    assert told in bdtool("export", tiny.path, "-o", target, status=2).stderr
    assert os.listdir(tmp_path) == ["here"]


def test_bundle_is_not_made_in_the_place_of_a_mount_point(bdtool, tiny, tmp_path, monkeypatch):
    """That failed as busy, after all the work."""
    volume = tmp_path / "a volume"
    volume.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda place: place == volume)
    message = bdtool("export", tiny.path, "-o", volume, status=2).stderr
    told = "is a mount point, which nothing can be put in the place of. Give a directory in it, for instance "
    assert f"'{volume}' {told}'{volume}/bundle'" in message
    assert os.listdir(tmp_path) == ["a volume"]

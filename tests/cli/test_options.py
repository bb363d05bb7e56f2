"""Options that do not fit what was asked for, and where output may go, before anything is read or computed."""

import os

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
    ],
)
def test_option_that_would_do_nothing_is_refused(bdtool, tiny, words, message):
    command, *others = words
    assert message in bdtool(command, tiny.bundle, *others, status=2).stderr


def test_closed_stderr_stops_nothing(bdtool_json, tiny, npz, monkeypatch):
    """As of a daemon: `2>&-`."""
    monkeypatch.setattr("bdtool.cli.output.sys.stderr", None)
    assert bdtool_json("evaluate", tiny.bundle, "--data", npz)["n_images"] > 0

"""Image files that `bdtool run` can take, and those that it names while it classifies the others."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _save(path, mode, size=(32, 32), colour=0):
    Image.new(mode, size, colour).save(path)
    return path


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (10, 20, 30, 255)), ("L", 7), ("1", 1), ("P", 3)])
def test_safe_modes_are_converted(bdtool_json, tiny, tmp_path, mode, colour):
    assert len(bdtool_json("run", tiny.bundle, _save(tmp_path / "i.png", mode, colour=colour))["images"]) == 1


@pytest.mark.parametrize(
    ("name", "mode", "colour", "message"),
    [
        ("i.png", "RGBA", (1, 2, 3, 128), "transparent pixels (alpha down to 128)"),
    ],
)
def test_other_modes_are_named(bdtool, tiny, tmp_path, picture, name, mode, colour, message):
    file = _save(tmp_path / name, mode, colour=colour)
    result = bdtool("run", tiny.bundle, picture, file, status=1)
    assert f"{file}: got mode {mode}" in result.stderr
    assert message in result.stderr
    assert str(picture) in result.stdout


def test_every_unreadable_image_is_named_and_the_others_are_classified(bdtool, bdtool_json, tiny, tmp_path, picture):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        file.write_text("no picture")
    np.save(tmp_path / "bits.npy", [[0, 0, 0], [1, 0, 1], [0, 0, 0]])
    words = ("run", tiny.bundle, files[0], picture, files[1], "--policy", tmp_path / "bits.npy")
    result = bdtool(*words, status=1)
    assert [line.split(": not a picture")[0] for line in result.stderr.splitlines()] == [f"Error: {f}" for f in files]
    assert result.stdout.splitlines()[1].split()[0] == str(picture)
    found = bdtool_json(*words, status=1)
    assert [(row["image"], row["policy"]) for row in found["images"]] == [(str(picture), "101")]
    assert [row["image"] for row in found["refused"]] == list(map(str, files))
    assert bdtool("run", tiny.bundle, *files, status=1).stdout == ""


def test_unreadable_image_is_named(bdtool, tiny, tmp_path):
    (tmp_path / "i.png").write_text("no picture")
    assert "i.png: not a picture in a known format" in bdtool("run", tiny.bundle, tmp_path / "i.png", status=1).stderr


def test_image_without_permission_does_not_stop_the_others(bdtool, tiny, tmp_path, monkeypatch):
    secret, picture = _save(tmp_path / "secret.png", "RGB"), _save(tmp_path / "i.png", "RGB")
    access, open_ = os.access, Image.open  # for root every file is readable, whatever its mode

    def refuse(path, *args, **options):
        if Path(path) == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, *args, **options)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != secret and access(path, mode))
    monkeypatch.setattr(Image, "open", refuse)
    result = bdtool("run", tiny.bundle, secret, picture, status=1)
    assert result.stdout.splitlines()[1].split()[0] == str(picture)
    assert "secret.png: cannot be read (PermissionError: [Errno 13] Permission denied" in result.stderr


def test_absent_image_is_wrong_usage(bdtool, tiny, tmp_path):
    assert "does not exist" in bdtool("run", tiny.bundle, tmp_path / "absent.png", status=2).stderr


def test_wrong_size_shows_the_option_that_helps(bdtool, bdtool_json, tiny, tmp_path):
    file = _save(tmp_path / "i.png", "RGB", (40, 48))
    message = bdtool("run", tiny.bundle, file, status=1).stderr
    assert "got 40 x 48 pixels, the model takes 32 x 32. Pass --resize" in message
    assert len(bdtool_json("run", tiny.bundle, file, "--resize")["images"]) == 1

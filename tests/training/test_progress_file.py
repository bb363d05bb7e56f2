"""The checkpoint of an unfinished run, where it cannot be written, and where it is of another run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdtool.errors import TrainingError
from bdtool.training.progress_file import FORMAT_VERSION, read_progress, write_progress

_WRITE_ON_A_SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from bdtool.training.progress_file import write_progress

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
write_progress(Path(sys.argv[1]), {"request": {}, "step": 2, "weights": torch.zeros(100_000)})
"""


def _said_on_a_small_disk(path):
    command = [sys.executable, "-c", _WRITE_ON_A_SMALL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return re.search(
        r"TrainingError: .*m\.checkpoint: the checkpoint cannot be written \(File too large\); (.*)", done.stderr
    )[1]


def test_full_disk_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "m.checkpoint"
    write_progress(path, {"request": {}, "step": 1})
    assert _said_on_a_small_disk(path) == "the one before is whole. Make room, then go on with --resume"
    assert read_progress(path, request={})["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["m.checkpoint"]


def test_full_disk_at_the_first_checkpoint_says_that_there_is_none(tmp_path):
    assert _said_on_a_small_disk(tmp_path / "m.checkpoint").startswith("there is none before it. ")
    assert not list(tmp_path.iterdir())


def test_run_of_an_older_version_goes_on(tmp_path):
    """It asked for whole images, as there was nothing else."""
    write_progress(tmp_path / "m.checkpoint", {"request": {"arch": "resnet8"}, "step": 2})
    assert read_progress(tmp_path / "m.checkpoint", request={"arch": "resnet8", "downscale": 1})["step"] == 2
    with pytest.raises(TrainingError, match=r"otherwise \(downscale was 1, is 2\)"):
        read_progress(tmp_path / "m.checkpoint", request={"arch": "resnet8", "downscale": 2})


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02.", b"\x80\x02K\x01.K\x01."])
def test_damaged_file_is_named(tmp_path, content):
    (tmp_path / "m.checkpoint").write_bytes(content)
    with pytest.raises(
        TrainingError, match=r"m\.checkpoint: not a whole checkpoint of a run \(.*remove it to start anew"
    ):
        read_progress(tmp_path / "m.checkpoint", request={})


def test_option_that_differs_is_named_alone(tmp_path):
    write_progress(tmp_path / "m.checkpoint", {"request": {"arch": "resnet8", "options": {"lr": 0.1, "seed": 0}}})
    with pytest.raises(TrainingError, match=r"otherwise \(lr was 0\.1, is 0\.2\); use the same"):
        read_progress(tmp_path / "m.checkpoint", request={"arch": "resnet8", "options": {"lr": 0.2, "seed": 0}})


def test_option_that_the_run_before_had_not_is_named(tmp_path):
    write_progress(tmp_path / "m.checkpoint", {"request": {"arch": "resnet8"}})
    with pytest.raises(TrainingError, match=r"otherwise \(limit was None, is 64\)"):
        read_progress(tmp_path / "m.checkpoint", request={"arch": "resnet8", "options": {"limit": 64}})


def test_checkpoint_of_a_newer_version_is_refused(tmp_path):
    write_progress(tmp_path / "m.checkpoint", {"request": {}, "format_version": FORMAT_VERSION + 1})
    with pytest.raises(TrainingError, match=r"has format_version 2, this bdtool reads up to 1; upgrade bdtool"):
        read_progress(tmp_path / "m.checkpoint", request={})


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoint_with_code_in_it_runs_none(tmp_path):
    torch.save({"format_version": 1, "request": {}, "step": _Code(tmp_path / "ran")}, tmp_path / "m.checkpoint")
    with pytest.raises(TrainingError, match="not a whole checkpoint of a run"):
        read_progress(tmp_path / "m.checkpoint", request={})
    assert not (tmp_path / "ran").exists()

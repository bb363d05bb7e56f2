"""The checkpoint of an unfinished run, where it cannot be written."""

import resource
import signal

import pytest
import torch

from bdtool.errors import TrainingError
from bdtool.training.progress_file import read_progress, write_progress


@pytest.fixture
def small_files():
    """Let no file grow beyond 10 kB, as on a disk that is nearly full."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, previous)


def test_full_disk_leaves_the_checkpoint_before(tmp_path, small_files):
    path, request = tmp_path / "m.checkpoint", {"epochs": 2}
    write_progress(path, {"request": request, "step": 1})
    with pytest.raises(
        TrainingError, match=r"m\.checkpoint: the checkpoint cannot be written .*the one before is whole"
    ):
        write_progress(path, {"request": request, "step": 2, "weights": torch.zeros(100_000)})
    assert read_progress(path, request=request)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["m.checkpoint"]


def test_option_that_differs_is_named_alone(tmp_path):
    write_progress(tmp_path / "m.checkpoint", {"request": {"arch": "resnet8", "options": {"lr": 0.1, "seed": 0}}})
    with pytest.raises(TrainingError, match=r"otherwise \(lr was 0\.1, is 0\.2\); use the same"):
        read_progress(tmp_path / "m.checkpoint", request={"arch": "resnet8", "options": {"lr": 0.2, "seed": 0}})

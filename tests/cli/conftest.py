"""The command line in this process and as a process of its own, and a small line of files for it to work on."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from bdtool import Orchestrator
from bdtool.cli import main
from bdtool.data.synthetic import synthetic_images

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def bdtool() -> Callable[..., Result]:
    """Return a function that runs one command in this process and demands an exit status; no traceback, ever."""

    def run(*words: object, status: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == status, f"{result.exit_code}: {result.output}{result.exception!r}"
        assert isinstance(result.exception, SystemExit | None)
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def bdtool_json(bdtool: Callable[..., Result]) -> Callable[..., Any]:
    """Return a function that runs one command with `--json -` and gives what it printed, which must be JSON alone."""
    return lambda *words, status=0: json.loads(bdtool(*words, "--json", "-", status=status).stdout)


@pytest.fixture
def start_bdtool() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Return a function that starts a command in a process of its own; it is gone after the test."""
    started = []

    def start(*words: object) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "bdtool", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Twenty synthetic pictures with labels 0 to 9."""
    path = tmp_path / "data.npz"
    np.savez(path, x=synthetic_images(20, height=32, width=32), y=np.arange(20) % 10)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(synthetic_images(1, height=32, width=32)[0]).save(path)
    return path


@pytest.fixture(scope="session")
def blockdrop_checkpoint(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny`, ResNet and policy network, as BlockDrop's authors would save them."""
    import torch

    from bdtool.models.checkpoint_formats import BLOCKDROP

    networks: dict[str, dict[str, torch.Tensor]] = {"resnet": {}, "agent": {}}
    for name, tensor in tiny.model.state_dict().items():
        key = BLOCKDROP.key(name, tiny.model.spec.architecture, policy_prefix="agent.")
        network, _, rest = key.partition(".")
        networks[network][rest] = tensor
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt_E_730.t7"
    torch.save({**networks, "epoch": 730, "acc": 0.9}, path)
    return path


@pytest.fixture(scope="session")
def save_labelled() -> Callable[[Path, Path, int], Path]:
    """Return a function that saves pictures, labelled with the class that a bundle's own network sees in them."""

    def save(bundle: Path, path: Path, n_images: int) -> Path:
        images = synthetic_images(n_images, height=32, width=32)
        with Orchestrator.open(bundle) as runtime:
            np.savez(path, x=images, y=runtime.run(images).classes)
        return path

    return save


@pytest.fixture(scope="session")
def labelled(tiny: Any, save_labelled: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of which the tiny network has all right, in fp32."""
    return save_labelled(tiny.bundle, tmp_path_factory.mktemp("labelled") / "data.npz", 40)


@pytest.fixture
def calibrate(bdtool_json: Callable[..., Any], bundle_copy: Path, labelled: Path) -> Callable[..., Any]:
    """Return a function that calibrates the copied bundle with some more options."""

    def run(*words: object, status: int = 0) -> Any:
        options = ("--data", labelled, "--max-accuracy-drop", 20, "--at-least", 8)
        return bdtool_json("calibrate", bundle_copy, *options, *words, status=status)

    return run

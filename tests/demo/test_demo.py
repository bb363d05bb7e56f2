"""The demo runs the real commands on the shipped model."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from bdtool.cli import main
from bdtool.demo import tour
from bdtool.demo.pictures import drawn_pictures
from bdtool.models.shipped import shipped_models
from bdtool.models.store import load_model
from bdtool.torch_classifier import TorchClassifier
from export import files


def _demo(output: Path, *, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["demo", "-o", str(output)])
    assert result.exit_code == status, f"{result.output}{result.exception!r}"
    assert isinstance(result.exception, SystemExit | None)
    return result


@pytest.mark.slow
def test_demo_ends_with_a_table_and_leaves_everything_behind(tmp_path: Path, shared_traces: None) -> None:
    output = tmp_path / "out"
    text = _demo(output).stdout
    for command in ("models", "export", "build", "verify", "run", "evaluate", "profile", "report"):
        assert f"$ bdtool {command}" in text
    table = text.split("Comparison on test.npz")[1].splitlines()
    assert "The base was fine-tuned for policy learned: every block at once is a baseline for time" in text
    assert table[1].split() == ["accuracy", "blocks", "FLOPs", "median", "ms", "time", "to", "full"]
    assert [row.split("  ")[0] for row in table[2:5]] == ["full (one engine)", "chain, all", "chain, learned"]
    assert table[2].split()[-1] == table[2].split()[-3] == "1.000"
    assert {"bundle", "airplane.png", "test.npz", "report.html"} <= {path.name for path in output.iterdir()}
    assert "Everything is in" in text


def test_a_step_that_fails_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` and `compare` say by their exit status that they found something."""

    @click.command
    def verify() -> None:
        raise click.exceptions.Exit(1)

    monkeypatch.setattr(main, "get_command", lambda context, name: verify)
    with pytest.raises(click.exceptions.Exit) as failure:
        tour._bdtool("verify")
    assert failure.value.exit_code == 1


def test_demo_without_the_extra_of_its_report_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    result = _demo(tmp_path / "out", status=2)
    assert "the report needs plotly, which is not installed" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train.npz", "airplane.png"])
def test_full_disk_is_told_with_the_file_that_found_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def write(path: Path, data: bytes) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_bytes", write)
    assert f"{tmp_path / 'out' / name}: No space left on device" in _demo(tmp_path / "out", status=1).stderr


def test_demo_leaves_other_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("precious")
    message = _demo(tmp_path / "photos", status=2).stderr
    assert "photos exists and was not made by the demo; choose another directory with -o" in message
    assert (tmp_path / "photos" / "cat.txt").read_text() == "precious"


def test_earlier_demo_is_replaced_even_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "out" / "bundle").mkdir(parents=True)
    (tmp_path / "out" / ".bdtool-demo").touch()
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    tour._prepare(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".bdtool-demo"]


def test_earlier_demo_is_replaced_without_what_others_put_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in (".bdtool-demo", "ship.png", "report.html", "mine/model.safetensors", "mine.npz"):
        (tmp_path / name).touch()
    tour._prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".bdtool-demo", "mine", "mine.npz"}
    assert (tmp_path / "mine" / "model.safetensors").exists()


def test_drawn_pictures_are_what_the_shipped_model_takes_them_for() -> None:
    images, labels = drawn_pictures(40, seed=1)
    model = load_model(shipped_models()["r32-cifar10"])
    result = TorchClassifier(model).run(images)
    assert np.mean(result.classes == labels) >= 0.9
    assert np.all(result.blocks_run < model.n_blocks)


def test_drawn_pictures_depend_on_seed_and_number_alone() -> None:
    images, labels = drawn_pictures(8)
    assert images.shape == (8, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 8, 9] * 2
    assert np.array_equal(drawn_pictures(4)[0], images[:4])
    assert not np.array_equal(drawn_pictures(4, seed=1)[0], images[:4])


def test_a_shipped_name_is_taken_wherever_a_model_is(tmp_path: Path, bdtool_words: Callable[..., Result]) -> None:
    assert "r32-cifar10" in bdtool_words("models").stdout
    assert "resnet32" in bdtool_words("inspect", "r32-cifar10").stdout
    refused = bdtool_words("export", "r33-cifar10", "-o", tmp_path / "bundle", status=2).stderr
    assert "no such file; shipped models: r32-cifar10" in refused


@pytest.fixture
def bdtool_words() -> Callable[..., Result]:
    def run(*words: object, status: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == status, result.output
        return result

    return run


def test_times_of_a_busy_machine_are_not_shown_without_a_word(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"accuracy": 0.9, "blocks": 3.0, "flops": 1.0, "median_ms": 1.0, "full_ms": 1.0, "ratio": 1.0}
    monkeypatch.setattr(
        tour, "_figures", lambda bundle, test, policy: {**figures, "policy": policy, "unstable": ["chain: torn apart"]}
    )
    tour._compare(bundle_copy, Path("test.npz"))
    shown = capsys.readouterr()
    assert "UNSTABLE, times are not to be trusted: learned (chain: torn apart), all (chain: torn apart)." in shown.err

"""The demo runs the real commands; here with one epoch, so nothing is said about its accuracy."""

import sys

import numpy as np
import pytest
from click.testing import CliRunner

from bdtool.cli import main
from bdtool.demo import tour


def _demo(output, *, status=0):
    result = CliRunner().invoke(main, ["demo", "-o", str(output)])
    assert result.exit_code == status, f"{result.output}{result.exception!r}"
    assert isinstance(result.exception, SystemExit | None)
    return result


@pytest.mark.slow
def test_demo_ends_with_a_table_and_leaves_everything_behind(tmp_path, monkeypatch, shared_traces):
    pytest.importorskip("sklearn", reason="scikit-learn, whose digits the demo trains on, is not installed")
    monkeypatch.setattr(tour, "EPOCHS", 1)
    monkeypatch.setattr(tour, "POLICIES", ("all", "distribute:5"))
    output = tmp_path / "out"
    text = _demo(output).stdout
    for command in ("export", "build", "verify", "run", "evaluate", "profile", "report"):
        assert f"$ bdtool {command} " in text
    table = text.split("Comparison on test.npz")[1].splitlines()
    assert table[1].split() == ["accuracy", "blocks", "FLOPs", "median", "ms", "time", "to", "full"]
    assert [row.split("  ")[0] for row in table[2:5]] == ["full (one engine)", "chain, all", "chain, distribute:5"]
    assert table[2].split()[-1] == table[2].split()[-3] == "1.000"
    assert {"bundle", "digits.safetensors", "test.npz", "report.html"} <= {path.name for path in output.iterdir()}
    assert len(list(output.glob("digit-*.png"))) == 5
    assert "Everything is in" in text


def test_demo_leaves_other_directories_alone(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn, whose digits the demo trains on, is not installed")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("precious")
    message = _demo(tmp_path / "photos", status=2).stderr
    assert "photos exists and was not made by the demo; choose another directory with -o" in message
    assert (tmp_path / "photos" / "cat.txt").read_text() == "precious"


def test_demo_without_scikit_learn_shows_the_pip_line_and_deletes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".bdtool-demo").touch()
    (tmp_path / "out" / "earlier").touch()
    assert "pip install 'bdtool[demo]'" in _demo(tmp_path / "out", status=1).stderr
    assert (tmp_path / "out" / "earlier").exists()


def test_earlier_demo_is_replaced_even_behind_a_link(tmp_path):
    (tmp_path / "out" / "bundle").mkdir(parents=True)
    (tmp_path / "out" / ".bdtool-demo").touch()
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    tour._prepare(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".bdtool-demo"]


def test_digits_are_real_images_of_ten_classes():
    pytest.importorskip("sklearn", reason="scikit-learn, whose digits the demo trains on, is not installed")
    from bdtool.demo.digits import load_digits

    digits = load_digits()
    assert digits.train_images.shape == (1437, 32, 32, 3)
    assert digits.test_images.shape == (360, 32, 32, 3)
    assert digits.test_images.dtype == np.uint8
    assert digits.test_images.max() == 255
    assert set(digits.test_labels) == set(range(10))

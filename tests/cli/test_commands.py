"""What all commands have in common: help, examples, exit statuses, and what goes to stdout and stderr."""

import errno
import json
import os
import re
from pathlib import Path

import click
import pytest
from PIL import Image

from bdtool.cli import main
from bdtool.cli.output import emit
from bdtool.cli.profile_tables import _print_lines
from bdtool.data.synthetic import synthetic_images

COMMANDS = sorted(main.commands)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_shows_help_with_an_example(bdtool, command, flag):
    text = bdtool(command, flag).stdout
    assert "Example:" in text
    assert f"bdtool {command}" in text.split("Example:")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(command):
    options = [p for p in main.commands[command].params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("import",),
            "Mean that inputs are normalised with, pixels being 0 to 1. Default: what the format's authors use",
        ),
        (("calibrate",), "CPU threads of one engine call. Default: the processors that are there, at most 4"),
        (("build",), "smallest batch (trtexec --minShapes). Default: 1"),
        (("evaluate",), "Only N images, drawn with seed 0. Default: all"),
        (("train", "curriculum"), "from 1 - ALPHA to ALPHA, which lies between 0.5 and 1"),
    ],
)
def test_help_says_what_an_option_is_without_being_given(bdtool, words, says):
    assert says in " ".join(bdtool(*words, "--help").stdout.split())


def test_help_of_the_program_lists_every_command(bdtool):
    text = bdtool("--help").stdout
    assert all(f"  {command} " in text for command in COMMANDS)
    assert "Example:" in text


def test_commands_of_the_contract_exist():
    assert {
        "import",
        "export",
        "build",
        "verify",
        "evaluate",
        "run",
        "profile",
        "inspect",
        "models",
        "doctor",
        "demo",
    } <= set(COMMANDS)


def test_unknown_command_is_wrong_usage(bdtool):
    assert "No such command 'deploy'" in bdtool("deploy", status=2).stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option_is_wrong_usage(bdtool, command):
    refused = bdtool(command, "--no-such-option", status=2).stderr
    assert re.search(r"No such option:? '?--no-such-option", refused)  # Click 8.2 sets no quotes


def test_version_is_shown(bdtool):
    from bdtool.version import version

    assert version() in bdtool("--version").stdout


def test_result_is_on_stdout_and_nothing_on_stderr(bdtool, tiny, npz):
    result = bdtool("evaluate", tiny.bundle, "--data", npz)
    assert "accuracy" in result.stdout
    assert result.stderr == ""


def test_warnings_go_to_stderr_and_json_alone_to_stdout(bdtool, tiny):
    result = bdtool("verify", tiny.bundle, "--limit", 4, "--json", "-")
    assert json.loads(result.stdout)["ok"] is True
    assert result.stderr.startswith("warning: the images are 64 synthetic pictures")


def test_json_file_is_written_beside_the_text(bdtool, tiny, npz, tmp_path):
    result = bdtool("evaluate", tiny.bundle, "--data", npz, "--json", tmp_path / "result.json")
    assert "accuracy" in result.stdout
    assert json.loads((tmp_path / "result.json").read_text())["n_images"] == 20


def test_full_disk_leaves_the_earlier_json_and_the_text(bdtool, tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text("earlier")

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = bdtool("models", "--json", tmp_path / "result.json", status=1)
    assert "Known architectures" in result.stdout
    advice = "make room and run the same command again"
    assert f"result.json: cannot be written (No space left on device); {advice}" in result.stderr
    assert (tmp_path / "result.json").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("words", [(), ("--json", "-")])
def test_full_disk_behind_stdout_is_named(bdtool, monkeypatch, words):
    def full(message, **options):
        if not options.get("err"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bdtool.cli.output.click.echo", full)
    message = "Error: stdout cannot be written to (No space left on device); send it elsewhere\n"
    assert bdtool("models", *words, status=1).stderr == message


def test_place_for_json_is_checked_before_the_work(bdtool, tiny, tmp_path, npz):
    words = ("evaluate", tiny.bundle, "--data", npz, "--json", tmp_path / "absent" / "result.json")
    assert "absent does not exist. Make it, or choose another place" in bdtool(*words, status=2).stderr


def test_error_of_the_system_is_one_line(bdtool, tiny, monkeypatch):
    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "some/file")

    monkeypatch.setattr("export.bundle.read_manifest", denied)
    assert bdtool("inspect", tiny.bundle, status=1).stderr == "Error: some/file: Permission denied\n"


def test_full_disk_says_what_to_do(bdtool, tiny, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "page.html")

    monkeypatch.setattr("export.bundle.read_manifest", full)
    said = "Error: page.html: No space left on device; make room and run the same command again\n"
    assert bdtool("inspect", tiny.bundle, status=1).stderr == said


def test_tables_begin_with_what_they_are_of(bdtool, tiny, npz):
    """Not with the empty line that parts them from a text above."""
    assert bdtool("models").stdout.startswith("Shipped models: ")
    many = bdtool("evaluate", tiny.bundle, "--data", npz, "--policy", "all", "--policy", "none").stdout
    assert many.startswith(f"20 images of {npz}\npolicy ")


def test_current_directory_that_was_deleted_is_named(bdtool, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    message = "Error: the current directory was deleted, perhaps made anew; change to one that is there (cd)\n"
    assert bdtool("export", tiny.path, "-o", "bundle", status=1).stderr == message


def test_doctor_and_models_give_json(bdtool_json):
    assert {"resnet32", "resnet110", "resnet101"} <= {row["name"] for row in bdtool_json("models")["architectures"]}
    assert {"name", "status", "remedy"} <= set(bdtool_json("doctor")["findings"][0])


def test_figures_of_shipped_models_say_how_many_images_they_are_of(bdtool):
    [row] = [line for line in bdtool("models").stdout.splitlines() if line.startswith("r32-cifar10")]
    assert row.endswith("10000 images of test.npz")


@pytest.mark.parametrize("to_file", [False, True])
def test_json_has_null_where_a_number_is_not_finite(tmp_path, capsys, to_file):
    result = {"error": float("inf"), "rows": [(1.5, float("nan"))], "ok": False}
    emit(result, str(tmp_path / "out.json") if to_file else "-", lambda: None)
    text = (tmp_path / "out.json").read_text() if to_file else capsys.readouterr().out
    assert json.loads(text) == {"error": None, "rows": [[1.5, None]], "ok": False}


LINE = {
    "fixed_ms": 0.2,
    "per_block_ms": 0.3,
    "break_even_blocks": 15.3,
    "r_squared": 0.96,
    "n_requests": 36,
    "points": "extra",
    "against": "full",
}


def test_a_cost_below_nothing_is_called_noise(capsys):
    _print_lines({"path": {**LINE, "fixed_ms": -0.6}, "chain": LINE}, n_blocks=54)
    assert "\npath: no cost is below 0; noise bends the line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("blocks", "said"), [(None, "-"), (-0.1, "never"), (0, "never"), (6.26, "6.3"), (8, "always"), (29, "always")]
)
def test_break_even_is_a_number_of_blocks_that_there_are(capsys, blocks, said):
    _print_lines({"chain@int8": {**LINE, "break_even_blocks": blocks, "against": "full@int8"}}, n_blocks=8)
    text = capsys.readouterr().out
    [row] = [line.split() for line in text.splitlines() if line.startswith("chain@int8 ")][:1]
    assert row[3:5] == [said, "full@int8"]
    assert "\nbreak-even: chain@int8 against `full@int8` (always: faster even with all 8 blocks; never: " in text


def test_warnings_of_the_log_look_like_those_of_a_command(start_bdtool, tiny, picture):
    n_threads = len(os.sched_getaffinity(0)) + 1
    _, stderr = start_bdtool("run", tiny.bundle, picture, "--threads", n_threads).communicate(timeout=120)
    assert stderr.splitlines()[0].startswith(f"warning: {n_threads} threads share ")


def test_commands_that_need_no_labels_take_folders_of_other_classes(bdtool, bundle_copy, tmp_path, caplog):
    for i, image in enumerate(synthetic_images(6, height=32, width=32)):
        path = tmp_path / "photos" / "xyz"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    data = ("--data", tmp_path / "photos")
    told = "got 3 class folders, the model has 10 classes without names"
    for words in (
        ("profile", bundle_copy, *data, "--duration", 0.01, "--warmup", 0),
        ("verify", bundle_copy, *data),
        ("calibrate", bundle_copy, *data),
        ("build", bundle_copy, *data, "--coverage", 0.9),
    ):
        caplog.clear()
        bdtool(*words)
        assert [said for said in caplog.messages if "labels" in said] == [
            f"{tmp_path / 'photos'}: {told}. Its images are taken without labels"
        ]
    refused = bdtool("evaluate", bundle_copy, *data, status=1).stderr
    assert f"{told}. Give one folder for every class" in refused
    assert told in bdtool("calibrate", bundle_copy, *data, "--eval", tmp_path / "photos", status=1).stderr

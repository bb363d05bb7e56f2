"""Progress on stderr: a bar on a terminal, dated lines in a log, and nothing of what takes no time."""

import errno
import itertools
import re
from contextlib import contextmanager
from functools import partial

import click
import pytest

from bdtool.cli import output, training_output
from bdtool.cli.output import ProgressLog
from bdtool.training.trainer import Report


class _Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return _Clock()


@pytest.fixture
def said(clock, monkeypatch, capsys):
    """Return a function that gives the lines since its last call, without their dates; one command says them all."""
    log = ProgressLog(clock)
    monkeypatch.setattr(output, "_log", lambda: log)

    def lines():
        told = capsys.readouterr().err.splitlines()
        assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in told)
        return [line[len("00:00:00 ") :] for line in told]

    return lines


def test_terminal_gets_a_progress_bar_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with output.progress("working", 2) as advance:
        advance(1, "block_00")
    captured = capsys.readouterr()
    assert "working" in captured.err
    assert captured.out == ""


def test_progress_by_share_moves_the_bar_by_what_came_since(monkeypatch):
    moves = []

    @contextmanager
    def bar(description, total, log):
        yield lambda advance, name: moves.append((advance, name))

    monkeypatch.setattr(output, "progress", bar)
    with output.progress_of_share("training") as on_share:
        on_share(0.25, "step 1")
        on_share(1.0)
    assert moves == [(0.25, "step 1"), (0.75, "")]


def test_log_gets_a_dated_line_every_30_s_but_none_before(said, clock):
    with output.progress("building", 100) as advance:
        for _ in range(65):
            clock.now += 1
            advance(1, "block_03")
    assert said() == ["building block_03, 30 %", "building block_03, 60 %"]


def test_training_without_a_terminal_gets_a_line_every_5_minutes(clock, monkeypatch, capsys):
    monkeypatch.setattr(training_output, "ProgressLog", partial(ProgressLog, clock))
    with training_output.show(enabled=True, rewarded=False) as (on_step, on_part):
        on_part(0.0, "masks")
        for _ in range(25):
            clock.now += 29
            on_part(0.2, "masks")
        for step in (50, 60):
            clock.now += 151
            on_step(Report(step=step, n_steps=100, loss=1.0, accuracy=0.5, blocks_mean=9.0, reward=0.0, note=""))
    lines = [line[len("00:00:00 ") :] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "masks",
        "training masks, 20 %",
        "training masks, 20 %",
        "training accuracy 50.0 %, blocks 9.00, 60 %",
    ]


def test_step_that_begins_is_a_line_once_the_command_has_spoken(said, clock):
    with output.progress_of_steps("calibrating") as on_step:
        on_step("collecting ranges", 0.5)  # too early
        clock.now += 31
        on_step("collecting ranges", 1)
        clock.now += 1
        on_step("measuring", 0.1)
        on_step("measuring", 0.2)
    with output.progress("counting masks", 10):
        pass
    assert said() == ["collecting ranges, 100 %", "measuring, 10 %", "counting masks, 0 %"]


def test_log_that_nobody_reads_does_not_end_the_work(clock, monkeypatch):
    def gone(message, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(click, "echo", gone)
    log = ProgressLog(clock)
    clock.now += 31
    log.say("building", 0.5)


@pytest.mark.parametrize(
    ("command", "steps"),
    [
        (("export", "-o", "exported"), ["exporting"]),
        (("build", "--no-resume", "--paths", 1, "--data", "synthetic:4"), ["building", "counting masks"]),
        (("verify", "--limit", 4, "--data", "synthetic:4"), ["verifying"]),
        (("profile", "--data", "synthetic:4", "--duration", 0.01, "--warmup", 0), ["profiling"]),
        (("calibrate", "--max-accuracy-drop", 100), ["collecting ranges", "correcting biases", "measuring"]),
        (("evaluate", "--policy", "all", "--policy", "none"), ["evaluating all", "evaluating none"]),
    ],
    ids=lambda words: words[0],
)
def test_long_commands_say_in_a_log_what_they_are_at(
    bdtool, tiny, bundle_copy, npz, monkeypatch, tmp_path, command, steps
):
    log = ProgressLog(itertools.count(0, 31).__next__)  # 31 s pass from one piece of news to the next
    monkeypatch.setattr(output, "_log", lambda: log)
    monkeypatch.chdir(tmp_path)
    name, *options = command
    data = ("--data", npz) if name in ("calibrate", "evaluate") else ()
    told = bdtool(name, tiny.path if name == "export" else bundle_copy, *data, *options).stderr
    for step in steps:
        assert re.search(rf"^\d\d:\d\d:\d\d {step}( \w+)?, \d+ %$", told, re.MULTILINE)

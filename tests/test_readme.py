"""What README.md shows can be done: its commands exist with these options, and its Python example runs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from bdtool.cli import main
from tests.command_line import command_of, parse

REPOSITORY = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def readme() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def _code(text: str, *languages: str) -> list[str]:
    return [match["code"] for match in _FENCE.finditer(text) if match["language"] in languages]


def _commands(text: str, program: str) -> list[list[str]]:
    """Return the words after `program` of every line that calls it, in fenced blocks and in `inline code`."""
    lines = [line for code in _code(text, "", "sh", "bash", "shell", "console", "text") for line in code.splitlines()]
    lines += re.findall(rf"`({program} [^`\n]+)`", _FENCE.sub("", text))
    words = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines if program in line]
    return [line[1:] for line in words if line[:1] == [program]]


def _parse(words: list[str]) -> None:
    """Let click read a command as the program would, without running it; files need not exist."""
    for parameter in command_of(words)[0].params:
        if isinstance(parameter.type, click.Path):
            parameter.type.exists = False
    parse(words)


def _every_command(group: click.Group) -> Iterator[click.Command]:
    for command in group.commands.values():
        yield from _every_command(command) if isinstance(command, click.Group) else [command]


@pytest.fixture
def paths_need_not_exist() -> Any:
    types = {id(p.type): p.type for c in _every_command(main) for p in c.params if isinstance(p.type, click.Path)}
    before = {key: path.exists for key, path in types.items()}
    yield
    for key, path in types.items():
        path.exists = before[key]


@pytest.mark.usefixtures("paths_need_not_exist")
def test_every_command_of_the_readme_exists_with_its_options(readme: str) -> None:
    commands = _commands(readme, "bdtool")
    assert {"import", "export", "run", "profile"} <= {words[0] for words in commands}
    for words in commands:
        assert words[0] in main.commands, f"README.md: no command {words}"
        has_arguments = len(words) > 1
        if has_arguments or words[0] in ("doctor", "models", "demo"):
            _parse(words)


@pytest.mark.usefixtures("paths_need_not_exist")
def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(click.UsageError):
        _parse(["profile", "bundle", "--no-such-option"])


def test_make_targets_of_the_readme_exist(readme: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = {words[0] for words in _commands(readme, "make")}
    assert {"demo", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_python_example_runs(readme: str, export_random: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bdtool import Orchestrator
    from bdtool.data.synthetic import synthetic_images

    examples = _code(readme, "python")
    assert any("Orchestrator.open" in code for code in examples)
    monkeypatch.chdir(tmp_path)
    Path("bundle").symlink_to(export_random("resnet32", has_policy=False).bundle, target_is_directory=True)
    np.savez("test.npz", x=synthetic_images(8, height=32, width=32), y=np.zeros(8, dtype=int))
    opened = Orchestrator.open
    # ONNX Runtime's pool is made once in a process, and other tests have made it
    monkeypatch.setattr(Orchestrator, "open", lambda *words, threads=None, **options: opened(*words, **options))
    for code in examples:
        exec(compile(code, "README.md", "exec"), {})


def test_linked_files_exist(readme: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []

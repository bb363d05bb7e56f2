"""What README.md and docs/ show can be done: their commands exist with these options, and the Python example runs."""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from bdtool.cli import main
from bdtool.models.shipped import shipped_models
from bdtool.models.store import read_spec
from bdtool.training.options import CurriculumOptions
from tests.command_line import command_of, parse

REPOSITORY = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, *sorted(REPOSITORY.glob("benchmarks/*.md")), REPOSITORY / "CONTRIBUTING.md"]


@pytest.fixture(scope="module")
def readme() -> str:
    """README.md and the pages that it leads to."""
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def _code(text: str, *languages: str) -> list[str]:
    """Return the fenced blocks of these languages, each command on one line."""
    blocks = [match["code"] for match in _FENCE.finditer(text) if match["language"] in languages]
    return [re.sub(r"\\\n\s*", "", code) for code in blocks]


def _commands(text: str, program: str) -> list[list[str]]:
    """Return the words after `program` of every line that calls it, in fenced blocks and in `inline code`."""
    lines = [line for code in _code(text, "", "sh", "bash", "shell", "console", "text") for line in code.splitlines()]
    lines += re.findall(rf"`({program} [^`\n]+)`", _FENCE.sub("", text))
    return _words(lines, program)


def _words(lines: list[str], program: str) -> list[list[str]]:
    words = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines if program in line]
    return [line[1:] for line in words if line[:1] == [program]]


def _parse(words: list[str]) -> dict[str, Any]:
    """Return the parameters of a command as the program would read them, without running it; files need not exist."""
    for parameter in command_of(words)[0].params:
        if isinstance(parameter.type, click.Path):
            parameter.type.exists = False
    return parse(words).params


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
        assert words[0] in main.commands, f"no command {words}"
        has_arguments = len(words) > 1
        if has_arguments or words[0] in ("doctor", "models", "demo"):
            _parse(words)


@pytest.mark.usefixtures("paths_need_not_exist")
def test_every_curriculum_of_the_readme_learns_all_blocks(readme: str) -> None:
    curricula = [words for words in _commands(readme, "bdtool") if words[:2] == ["train", "curriculum"]]
    assert len(curricula) > 1
    for words in curricula:
        given = _parse(words)
        options = CurriculumOptions(
            **{field.name: given[field.name] for field in dataclasses.fields(CurriculumOptions)}
        )
        options.check_all_learned(steps_per_epoch=50_000 // options.batch, n_blocks=15)  # a ResNet-32 on CIFAR-10


@pytest.mark.usefixtures("paths_need_not_exist")
def test_training_commands_of_the_readme_are_those_of_the_shipped_model(readme: str) -> None:
    """All but the first, as its base was imported; and but for the number format, which depends on the machine."""
    [code] = [code for code in _code(readme, "") if "bdtool train pretrain" in code]
    expected = _trainings(read_spec(shipped_models()["r32-cifar10"]).provenance)
    for training, words in zip(expected, _words(code.splitlines(), "bdtool")[1:], strict=True):
        given, recorded = _parse(words), training["options"]
        assert f"bdtool train {words[1]}" == training["created_by"]
        both = recorded.keys() & given.keys() - {"amp"}  # options came and went between versions
        assert {name: given[name] for name in both} == {name: recorded[name] for name in both}, words


def _trainings(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what is recorded of the trainings that led to a MODEL, in their order: those of its trunks first."""
    trainings, trunks = [], []
    while "options" in provenance:
        trainings.insert(0, provenance)
        trunks += [provenance["policy_trunk"]] if "policy_trunk" in provenance else []
        provenance = provenance["start"]
    return trunks + trainings


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

    # whole programs take arguments; tests/cli/test_without_bdtool.py runs these
    examples = [code for code in _code(readme, "python") if "sys.argv" not in code]
    assert any("Orchestrator.open" in code for code in examples)
    monkeypatch.chdir(tmp_path)
    Path("bundle").symlink_to(export_random("resnet32", has_policy=False).bundle, target_is_directory=True)
    np.savez("test.npz", x=synthetic_images(8, height=32, width=32), y=np.zeros(8, dtype=int))
    opened = Orchestrator.open
    # ONNX Runtime's pool is made once in a process, and other tests have made it
    monkeypatch.setattr(Orchestrator, "open", lambda *words, threads=None, **options: opened(*words, **options))
    for code in examples:
        exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_linked_files_and_sections_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, section = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not section or section in _sections(target), link


def _sections(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_leads_to_every_page() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []

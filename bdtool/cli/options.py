"""Options that several commands share, and parameter types."""

from __future__ import annotations

import errno
import math
import os
import shlex
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from engines.base import DEFAULT_BACKEND, DEFAULT_DEVICE, full_device_name
from export.manifest import CALIBRATED, EXPORTED, MANIFEST_NAME, WEIGHTS_NAME

_Command = TypeVar("_Command", bound=Callable[..., Any])

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
PRECISION = click.Choice([EXPORTED, *CALIBRATED])


class NewFile(click.Path):
    """A file to write. Its directory is checked at the door: a result must not be lost after minutes of work."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if str(path) == "-":
            if not self.allow_dash:
                self.fail("'-' is no name of a file: only --json writes to stdout; give one", param, ctx)
            return path
        place = Path(os.fsdecode(path))
        if problem := _problem_of_link(place) or _problem_of_place(place.parent):
            self.fail(f"{str(path)!r}: {problem}", param, ctx)
        return path


class NewDirectory(click.Path):
    """A directory to make or to replace, with those above it; that they can be made is checked at the door."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if str(value) in ("", "-"):
            hint = ": only --json writes to stdout; give one" if str(value) else "; give one"
            self.fail(f"{str(value)!r} is no name of a directory{hint}", param, ctx)
        if path.exists() and not path.is_dir():
            self.fail(f"{str(value)!r} is a file, expected a directory to make; choose another name", param, ctx)
        if problem := _problem_of_link(path):
            self.fail(f"{str(value)!r}: {problem}", param, ctx)
        above = next(place for place in path.resolve().parents if place.exists())  # of a link, where it leads
        if not path.exists() and (problem := _problem_of_place(above)):
            self.fail(f"{str(value)!r}: {problem}", param, ctx)
        return super().convert(value, param, ctx)


class NewBundle(NewDirectory):
    """A BUNDLE to make. When it is whole it takes the place of what was there, which is removed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(super().convert(value, param, ctx))
        place = path.resolve()
        if Path.cwd().is_relative_to(place):
            what = "is the directory you are in" if Path.cwd() == place else "holds the directory you are in"
            self.fail(f"{str(path)!r} {what}, and a bundle takes its whole place. {_inside(path)}", param, ctx)
        if os.path.ismount(place):
            what = "is a mount point, which nothing can be put in the place of"
            self.fail(f"{str(path)!r} {what}. {_inside(path)}", param, ctx)
        return path


def _inside(directory: Path) -> str:
    return f"Give a directory in it, for instance {shlex.quote(str(directory / 'bundle'))}"


def _problem_of_link(path: Path) -> str | None:
    try:
        path.stat()
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            return "a symbolic link that leads to itself. Choose another name"
    return None


def _problem_of_place(directory: Path) -> str | None:
    """Say why nothing can be written into a directory; None: it can be."""
    if directory.is_dir():
        can = os.access(directory, os.W_OK)
        return None if can else f"the directory {directory} cannot be written to. Choose another place"
    if directory.exists():
        return f"{directory} is a file, no directory. Choose another place"
    return f"the directory {directory} does not exist. Make it, or choose another place"


class NewModel(NewFile):
    """A MODEL to write: a whole file, after maybe hours of work."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(super().convert(value, param, ctx))
        if path.exists() and not path.is_file():
            self.fail(f"{str(path)!r} is a device or a pipe, and a MODEL needs a regular file", param, ctx)
        return path


class ModelPath(click.Path):
    """A MODEL file, or the name of one that ships with the package; a file of that name goes first."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from bdtool.models.shipped import shipped_models

        shipped, path = shipped_models(), Path(value)
        if str(value) in shipped and not path.exists():
            value = shipped[str(value)]
        elif self.exists and not path.exists():
            names = f"; shipped models: {', '.join(shipped)}" if shipped else ""
            self.fail(f"{str(value)!r}: no such file{names}", param, ctx)
        elif path.is_dir() and not self.dir_okay:
            self.fail(_directory_for_model(path), param, ctx)
        elif path.name == MANIFEST_NAME and self.dir_okay and path.is_file():
            self.fail(_file_for_bundle(path), param, ctx)
        return super().convert(value, param, ctx)


class BundlePath(click.Path):
    """A BUNDLE directory; whoever gives the MODEL in its place is told what makes the one of the other."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from bdtool.models.shipped import shipped_models

        path = Path(value)
        if path.is_file():
            self.fail(_file_for_bundle(path), param, ctx)
        if not path.exists() and str(value) in shipped_models():
            self.fail(f"{str(value)!r} is a MODEL that ships with bdtool, {_made_of(value)}", param, ctx)
        if self.exists and not path.exists():
            place = shlex.quote(str(value))
            self.fail(f"{str(value)!r}: no such directory. `bdtool export MODEL -o {place}` makes one", param, ctx)
        return super().convert(value, param, ctx)


class CheckpointPath(click.Path):
    """A checkpoint of another program: its file, or a directory with it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from bdtool.models.shipped import shipped_models

        if str(value) in shipped_models() and not Path(value).exists():
            what = "is a MODEL already, which ships with bdtool. Go on with it: bdtool export"
            self.fail(f"{str(value)!r} {what} {value} -o bundle", param, ctx)
        if (Path(value) / MANIFEST_NAME).is_file():
            what = "is a BUNDLE already, expected a checkpoint. Go on with it: bdtool build"
            self.fail(f"{str(value)!r} {what} {shlex.quote(str(value))}", param, ctx)
        return super().convert(value, param, ctx)


class ImagePath(click.Path):
    """An image file to classify."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if Path(value).is_dir():
            what = f"is a directory, expected image files, for instance {shlex.quote(str(value))}/*.png"
            self.fail(f"{str(value)!r} {what}; `bdtool evaluate --data` takes directories", param, ctx)
        return super().convert(value, param, ctx)


class PathInText(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A text that may name a file or directory to read; `path_of` returns that, or None."""

    def __init__(self, name: str, path_of: Callable[[str], Path | None]) -> None:
        self.name, self.path_of = name, path_of


def _path_of_data(data: str) -> Path | None:
    from bdtool.data.sources import path_from_data

    return path_from_data(data)


def _path_of_policy(policy: str) -> Path | None:
    from bdtool.runtime.policies import names_file

    return Path(policy.strip()) if names_file(policy) else None


def _directory_for_model(path: Path) -> str:
    weights = path / WEIGHTS_NAME
    if (path / MANIFEST_NAME).is_file() and weights.is_file():
        return f"{str(path)!r} is a BUNDLE, expected a MODEL file. It was exported from the one in it: {str(weights)!r}"
    return f"{str(path)!r} is a directory, expected a MODEL file (.safetensors)"


def _file_for_bundle(path: Path) -> str:
    for directory in (path.parent, path.parent.parent):
        if (directory / MANIFEST_NAME).is_file():
            return f"{str(path)!r} is a file of the BUNDLE {str(directory)!r}; give that directory"
    if path.suffix == ".safetensors":
        return f"{str(path)!r} is a file, {_made_of(path)}"
    return f"{str(path)!r} is a file, expected the directory of a BUNDLE, which `bdtool export` makes of a MODEL"


def _made_of(model: Any) -> str:
    made = f"bdtool export {shlex.quote(str(model))} -o bundle"
    return f"expected the directory of a BUNDLE. Make one of a MODEL: {made}"


BUNDLE = BundlePath(exists=True, file_okay=False, path_type=Path)
MODEL = ModelPath(exists=True, dir_okay=False, path_type=Path)
CHECKPOINT = CheckpointPath(exists=True, path_type=Path)
IMAGE = ImagePath(exists=True, dir_okay=False, readable=False, path_type=Path)  # read_image names those that are not
MODEL_OR_BUNDLE = ModelPath(exists=True, path_type=Path)
NEW_BUNDLE = NewBundle(file_okay=False, path_type=Path)
NEW_DIRECTORY = NewDirectory(file_okay=False, path_type=Path)
NEW_FILE = NewFile(dir_okay=False, path_type=Path)
NEW_MODEL = NewModel(dir_okay=False, path_type=Path)
DATA = PathInText("data", _path_of_data)
POLICY = PathInText("policy", _path_of_policy)
JSON_FILE = NewFile(dir_okay=False, allow_dash=True, path_type=str)


class FiniteRange(click.FloatRange):
    """A number within bounds that is neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r}: expected a finite number", param, ctx)
        return number


class NumberList(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """Comma-separated numbers, as a tuple of floats; `length` fixes how many."""

    name = "numbers"

    def __init__(self, length: int | None = None, low: float = float("-inf"), high: float = float("inf")) -> None:
        self._length, self._low, self._high = length, low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            numbers = tuple(float(text) for text in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: expected numbers separated by commas", param, ctx)
        if self._length is not None and len(numbers) != self._length:
            self.fail(f"{value!r}: got {len(numbers)} numbers, expected {self._length}", param, ctx)
        if not all(math.isfinite(number) for number in numbers):
            self.fail(f"{value!r}: expected finite numbers", param, ctx)
        if not all(self._low <= number <= self._high for number in numbers):
            self.fail(f"{value!r}: each number must lie between {self._low:g} and {self._high:g}", param, ctx)
        return numbers


def json_option(command: _Command) -> _Command:
    help_text = "Write the result as JSON to FILE; - is stdout, instead of the text."
    return click.option("--json", "json_file", type=JSON_FILE, metavar="FILE", help=help_text)(command)


_POLICY_HELP = (
    "learned[:THRESHOLD], all, none, first:K, random:K[:SEED], random:LOW-HIGH[:SEED], distribute:K, a string of 0 and "
    "1, or FILE.npy. Default: learned where the model has a policy network, else the bits that its base was trained "
    "for, else all."
)


def policy_option(command: _Command) -> _Command:
    return click.option("--policy", type=POLICY, metavar="POLICY", help=_POLICY_HELP)(command)


def policies_option(command: _Command) -> _Command:
    """--policy, as often as wanted; the command gets a tuple `policies`."""
    help_text = f"{_POLICY_HELP} Given several times: one after the other, as a table."
    return click.option("--policy", "policies", type=POLICY, multiple=True, metavar="POLICY", help=help_text)(command)


def data_option(*, default: str | None = None) -> Callable[[_Command], _Command]:
    """--data, which has to be given, but where `default` says in the help what holds without it."""
    help_text = (
        "FILE.npz, a directory of images (with a folder per class: labelled), cifar10:ROOT, cifar100:ROOT, "
        "imagenet:ROOT, or synthetic[:N[:SEED]]."
    )
    if default is not None:
        help_text += f" {default}"
    return click.option("--data", type=DATA, metavar="DATA", required=default is None, help=help_text)


def resize_option(command: _Command) -> _Command:
    help_text = (
        "Scale and centre-crop images of another size to the network's input instead of refusing them; a model whose "
        "own preprocessing resizes, as ImageNet's do, needs no asking."
    )
    return click.option("--resize", is_flag=True, help=help_text)(command)


def colour_options(*, default: str) -> Callable[[_Command], _Command]:
    """--mean and --std; `default` says in the help what they are where they are not given."""
    help_text = f"Mean that inputs are normalised with, pixels being 0 to 1. Default: {default}."
    mean = click.option("--mean", type=NumberList(3, low=0, high=1), metavar="R,G,B", help=help_text)
    std = click.option("--std", type=NumberList(3), metavar="R,G,B", help="Standard deviation, likewise.")
    return lambda command: mean(std(command))


def resize_to_option(*, default: str) -> Callable[[_Command], _Command]:
    """--resize-to; `default` says in the help what it is for ImageNet's networks where it is not given."""
    help_text = (
        "Pixels that the shorter side of a picture is scaled to, before its middle is taken. Default: "
        f"{default}, with a --size other than 224 in proportion to it; none for CIFAR's."
    )
    return click.option("--resize-to", "resize_to", type=click.IntRange(min=1), metavar="N", help=help_text)


def size_option(command: _Command) -> _Command:
    help_text = "Pixels of the network's input, square. Default: 32 for CIFAR's architectures, 224 for ImageNet's."
    return click.option("--size", type=click.IntRange(min=1), metavar="N", help=help_text)(command)


def threads_option(command: _Command) -> _Command:
    help_text = "CPU threads of one engine call. Default: the processors that are there, at most 4."
    return click.option("--threads", type=click.IntRange(min=1), help=help_text)(command)


def backend_option(command: _Command) -> _Command:
    help_text = "Inference library: onnxruntime, onnxruntime-tensorrt, torch, tensorrt or tensorrt-rtx."
    option = click.option("--backend", default=DEFAULT_BACKEND, show_default=True, metavar="NAME", help=help_text)
    return option(command)


def was_given(option: str) -> bool:
    """Return whether the running command was given an option, by its parameter's name, or takes its default."""
    return click.get_current_context().get_parameter_source(option) == ParameterSource.COMMANDLINE


def refuse_idle(options: Iterable[str], reason: str) -> None:
    """Refuse what somebody asked for and would not get.

    Raises:
        click.UsageError: one of the options, by the names of their parameters, was given.
    """
    if idle := [_as_given(option) for option in options if was_given(option)]:
        raise click.UsageError(f"{', '.join(idle)}: no effect, as {reason}")


def _as_given(option: str) -> str:
    """Return how the running command was given an option: "--no-fuse" where it is off."""
    words = option.replace("_", "-")
    return f"--no-{words}" if click.get_current_context().params[option] is False else f"--{words}"


def device_option(*, help_text: str) -> Callable[[_Command], _Command]:
    return click.option(
        "--device",
        default=DEFAULT_DEVICE,
        show_default=True,
        callback=lambda _ctx, _param, device: full_device_name(device),
        metavar="cpu|cuda|cuda:N",
        help=f"{help_text} cuda is cuda:0.",
    )


def precision_option(*, help_text: str) -> Callable[[_Command], _Command]:
    return click.option("--precision", type=PRECISION, default=EXPORTED, show_default=True, help=help_text)


def place_options(*, graphs: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--backend, --device, --threads, --precision and, with `graphs`, --cuda-graph; the command gets one `place`."""
    options = {
        "backend": backend_option,
        "device": device_option(help_text="Where engines run."),
        "threads": threads_option,
        "precision": precision_option(help_text="Which parts to use."),
    }
    if graphs:
        options["cuda_graph"] = click.option(
            "--cuda-graph",
            default="auto",
            show_default=True,
            metavar="MODE",
            help="CUDA graphs of strategies graph and full on a GPU: policy-cache, switch, path-cache, off (plain "
            "launches), or auto (the fastest of those that driver and packages allow).",
        )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def with_place(*args: Any, **given: Any) -> Any:
            from bdtool.runtime.place import Place

            place = Place(**{name: given.pop(name) for name in options})
            return command(*args, place=place, **given)

        wrapped: Callable[..., Any] = with_place
        for option in reversed(options.values()):
            wrapped = option(wrapped)
        return wrapped

    return decorate

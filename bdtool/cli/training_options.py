"""The options of `bdtool train`: those that its stages share, and those that are fields of a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import click

from bdtool.cli.options import (
    DATA,
    MODEL,
    NEW_DIRECTORY,
    NEW_MODEL,
    POLICY,
    FiniteRange,
    json_option,
    resize_option,
)
from bdtool.training.options import StageOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])
_RANGES: dict[str, click.IntRange | FiniteRange] = {  # where not all numbers from 0 on are allowed
    **dict.fromkeys(("judges", "stage_blocks", "limit"), click.IntRange(min=1)),
    **dict.fromkeys(("epochs", "stage_epochs", "lr", "base_lr"), FiniteRange(min=0, min_open=True)),
    "batch": click.IntRange(min=2),
    "alpha": FiniteRange(min=0.5, max=1, min_open=True, max_open=True),
}
_CHOICES = {
    "schedule": ["constant", "one-cycle", "cosine", "step"],
    "amp": ["auto", "bf16", "off"],
    "augment": ["crop", "flip"],
}


def run_options(command: _Command) -> _Command:
    """What every stage takes: data, output and device."""
    return _with_options(
        command,
        click.option(
            "--data",
            type=DATA,
            metavar="DATA",
            required=True,
            help="Labelled training images: FILE.npz, a folder per class, cifar10:ROOT, cifar100:ROOT, imagenet:ROOT.",
        ),
        click.option(
            "--val",
            type=DATA,
            metavar="DATA",
            help="Labelled images to measure on, after each epoch and at the end.",
        ),
        resize_option,
        click.option("-o", "--output", type=NEW_MODEL, required=True, metavar="MODEL", help="The MODEL file to write."),
        click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N", help="Where to train."),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice."),
        json_option,
    )


def resume_options(*, save_every_s: int, also: str) -> Callable[[_Command], _Command]:
    """How to go on with a run, and how often to save it; `also` says when that is done besides."""
    return lambda command: _with_options(
        command,
        click.option("--resume", is_flag=True, help="Go on with the unfinished run of the same options, if any."),
        click.option(
            "--save-every",
            "save_every_s",
            type=FiniteRange(min=0),
            default=save_every_s,
            show_default=True,
            metavar="S",
            help=f"Seconds between checkpoints; one is written {also}, too.",
        ),
    )


def epoch_options(command: _Command) -> _Command:
    """What the stages take that go by epochs: how to go on, and where to log."""
    return _with_options(
        command,
        resume_options(save_every_s=120, also="after each epoch"),
        click.option("--tensorboard", type=NEW_DIRECTORY, help="Write event files here. Needs the extra `train`."),
    )


def _with_options(command: _Command, *options: Callable[[_Command], _Command]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


def options_of(kind: type[StageOptions], help_texts: dict[str, str]) -> Callable[[_Command], _Command]:
    """Make one command-line option of each field of a dataclass, with its default and type."""

    def decorate(command: _Command) -> _Command:
        for field in reversed(dataclasses.fields(kind)):
            command = _option_from_field(field, help_texts[field.name])(command)
        return command

    return decorate


def _option_from_field(field: dataclasses.Field[Any], help_text: str) -> Callable[[_Command], _Command]:
    name = "--" + field.name.replace("_", "-")
    default = field.default
    if field.name in _CHOICES:
        return click.option(
            name, type=click.Choice(_CHOICES[field.name]), default=default, show_default=True, help=help_text
        )
    if isinstance(default, bool):
        return click.option(name, is_flag=True, default=default, help=help_text)
    if field.name == "policy":
        return click.option(name, type=POLICY, metavar="POLICY", default=default, show_default=True, help=help_text)
    natural = FiniteRange(min=0) if str(field.type).startswith("float") else click.IntRange(min=0)
    number = _RANGES.get(field.name, natural)
    return click.option(name, type=number, default=default, show_default=default is not None, help=help_text)


SHARED_HELP = {
    "epochs": "Passes over the data; may be a fraction.",
    "batch": "Images a step, over all processes.",
    "lr": "Highest learning rate.",
    "schedule": "How the learning rate runs: one-cycle warms up and falls to almost 0, cosine falls to 0, step divides "
    "by 10 at half and at three quarters of the run.",
    "seed": "Of every random draw.",
    "augment": "Crop and flip the images, or only flip them: policy networks learn best from what they will see.",
    "amp": "bfloat16; auto takes it where it is faster: CUDA, and CPUs with AMX.",
    "limit": "Draw N of the training images, with seed 0, and read no others.",
}
SGD_HELP = {"momentum": "Of SGD, Nesterov's.", "weight_decay": "Of SGD."}
POLICY_HELP = {
    "gamma": "Penalty of a wrong prediction (equation 3): higher keeps more blocks.",
    "alpha": "Keep bits are sampled with probabilities from 1 - ALPHA to ALPHA, which lies between 0.5 and 1.",
    "entropy": "Weight of an entropy bonus.",
}


trunk_option = click.option(
    "--trunk",
    type=MODEL,
    metavar="MODEL",
    help="A trained classifier for a new policy network to start from: a resnet8 of pretrain (ImageNet: resnet10 with "
    "--downscale 2), with the --mean, --std, --size and --resize-to of the MODEL. The policy network scales images "
    "down as it does.",
)


_Options = TypeVar("_Options", bound=StageOptions)


def options_from(kind: type[_Options], given: dict[str, Any]) -> _Options:
    return kind(**{field.name: given[field.name] for field in dataclasses.fields(kind)})

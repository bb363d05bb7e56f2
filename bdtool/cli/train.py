"""`bdtool train`: pretrain, deepen, curriculum, imitate, finetune."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bdtool.cli.command import Group
from bdtool.cli.options import (
    DATA,
    MODEL,
    NEW_DIRECTORY,
    NEW_MODEL,
    POLICY,
    FiniteRange,
    colour_options,
    json_option,
    resize_option,
    resize_to_option,
    size_option,
)
from bdtool.cli.output import emit
from bdtool.cli.training_output import logs, print_figures, print_resumed, show
from bdtool.training.options import CurriculumOptions, FinetuneOptions, ImitateOptions, PretrainOptions, StageOptions
from bdtool.words import counted

if TYPE_CHECKING:
    import torch

    from bdtool.data.batches import ImageSource
    from bdtool.models.model import BlockDropModel
    from bdtool.models.model_spec import ModelSpec
    from bdtool.specs import NetworkSpec
    from bdtool.training.place import TrainingPlace
    from bdtool.training.stages import Trained

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


@click.group("train", cls=Group)
def train_cmd() -> None:
    """Train a base network, a policy network for it, or both together (the paper's Algorithm 1).

    \b
    Example:
      bdtool train pretrain --arch resnet32 --data cifar10:data -o base.safetensors
      bdtool train curriculum base.safetensors --data cifar10:data -o policy.safetensors
      bdtool train finetune policy.safetensors --data cifar10:data -o model.safetensors

    On several GPUs: torchrun --nproc-per-node 4 -m bdtool train ... --device cuda
    """


def _run_options(command: _Command) -> _Command:
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


def _resume_options(*, save_every_s: int, also: str) -> Callable[[_Command], _Command]:
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


def _epoch_options(command: _Command) -> _Command:
    """What the stages take that go by epochs: how to go on, and where to log."""
    return _with_options(
        command,
        _resume_options(save_every_s=120, also="after each epoch"),
        click.option("--tensorboard", type=NEW_DIRECTORY, help="Write event files here. Needs the extra `train`."),
    )


def _with_options(command: _Command, *options: Callable[[_Command], _Command]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


def _options_of(kind: type[StageOptions], help_texts: dict[str, str]) -> Callable[[_Command], _Command]:
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


_SHARED_HELP = {
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
_SGD_HELP = {"momentum": "Of SGD, Nesterov's.", "weight_decay": "Of SGD."}
_POLICY_HELP = {
    "gamma": "Penalty of a wrong prediction (equation 3): higher keeps more blocks.",
    "alpha": "Keep bits are sampled with probabilities from 1 - ALPHA to ALPHA, which lies between 0.5 and 1.",
    "entropy": "Weight of an entropy bonus.",
}


_TRUNK = click.option(
    "--trunk",
    type=MODEL,
    metavar="MODEL",
    help="A trained classifier for a new policy network to start from: a resnet8 of pretrain (ImageNet: resnet10 with "
    "--downscale 2), with the --mean, --std and --size of the MODEL. The policy network scales images down as it does.",
)


@train_cmd.command("pretrain")
@click.option("--arch", required=True, metavar="NAME", help="Architecture, for instance resnet32; see `bdtool models`.")
@click.option(
    "--classes",
    type=click.IntRange(min=1),
    help="Number of classes. Default: of class folders or a named data set theirs, of a file 10 (CIFAR) or 1000.",
)
@colour_options(default="CIFAR-10's or ImageNet's")
@size_option
@resize_to_option(default="256 for ImageNet's architectures")
@click.option(
    "--downscale",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Average N x N pixels into one first, as a trunk for a policy network that does so, too.",
    metavar="N",
)
@_options_of(PretrainOptions, {**_SHARED_HELP, **_SGD_HELP, "compile": "Compile the network with torch.compile."})
@_run_options
@_epoch_options
def pretrain_cmd(
    arch: str,
    classes: int | None,
    mean: Any,
    std: Any,
    size: int | None,
    resize_to: int | None,
    downscale: int,
    **given: Any,
) -> None:
    """Train a base ResNet from random weights.

    \b
    Example:
      bdtool train pretrain --arch resnet32 --data cifar10:data --val cifar10:data -o base.safetensors
    """
    from bdtool.training.base_spec import base_spec
    from bdtool.training.stages import pretrain

    options = _options_from(PretrainOptions, given)
    spec = base_spec(
        arch,
        data=given["data"],
        n_classes=classes,
        mean=mean,
        std=std,
        size=size,
        resize=resize_to,
        downscale=downscale,
    )
    _run(given, spec, "", lambda place: pretrain(spec, options, place))


@train_cmd.command("deepen")
@click.argument("shallow", type=MODEL, metavar="MODEL")
@click.option("--arch", required=True, metavar="NAME", help="A deeper architecture of the same blocks, as resnet110.")
@click.option("-o", "--output", type=NEW_MODEL, required=True, metavar="MODEL", help="The MODEL file to write.")
def deepen_cmd(shallow: Path, arch: str, output: Path) -> None:
    """Make a deeper base of the base of MODEL, by repeating its blocks (Chang et al., ICLR 2018).

    It is nearly as good before any training, and a start for training where there are no weights of its depth. A policy
    network is left out, as it decides for the blocks that MODEL had.

    \b
    Example:
      bdtool train deepen resnet32.safetensors --arch resnet110 -o resnet110.safetensors
    """
    from bdtool.models.store import load_model, save_model
    from bdtool.training.deepening import deepen

    model = load_model(shallow)
    deeper = deepen(model, arch)
    save_model(deeper, output)
    click.echo(f"{output}: {arch}, {deeper.n_blocks} blocks from the {model.n_blocks} of {shallow.name}")


@train_cmd.command("curriculum")
@click.argument("base", type=MODEL, metavar="MODEL")
@_options_of(
    CurriculumOptions,
    {
        **_SHARED_HELP,
        **_POLICY_HELP,
        "stage_epochs": "Epochs after which more blocks are learned. Default: so that all are by half of the run.",
        "stage_blocks": "How many more, from the last block to the first.",
    },
)
@_TRUNK
@_run_options
@_epoch_options
def curriculum_cmd(base: Path, trunk: Path | None, **given: Any) -> None:
    """Train a policy network for the base of MODEL, which stays as it is.

    \b
    Example:
      bdtool train curriculum base.safetensors --data cifar10:data --val cifar10:data -o policy.safetensors
      bdtool train curriculum base.safetensors --trunk resnet8.safetensors --data cifar10:data -o policy.safetensors
    """
    from bdtool.training.stages import curriculum

    options = _options_from(CurriculumOptions, given)
    start, first_trunk, digests = _load_both(base, trunk)
    _run(given, start.spec, digests, lambda place: curriculum(start, options, place, trunk=first_trunk))


@train_cmd.command("imitate")
@click.argument("base", type=MODEL, metavar="MODEL")
@_options_of(
    ImitateOptions,
    {
        **_SHARED_HELP,
        "fewest": "Blocks of the easiest images; 0 is a third of the model's.",
        "most": "Blocks of the hardest images; 0 is 0.6 of the model's.",
        "hidden": "Width of a new policy network's hidden layer; 0 for none.",
        "judges": "Training images on which the masks are compared.",
    },
)
@_TRUNK
@_run_options
@_resume_options(save_every_s=60, also="before the result is measured")
def imitate_cmd(base: Path, trunk: Path | None, **given: Any) -> None:
    """Train a policy network for the base of MODEL to give harder images more blocks.

    Which blocks are missed least, and which images are hard, the base's own losses on the training images show. Not in
    the paper: minutes of this take the place of thousands of epochs of curriculum. A ResNet-110 takes longer; Ctrl-C
    saves first, and --resume goes on.

    \b
    Example:
      bdtool train imitate tolerant.safetensors --trunk resnet8.safetensors --data cifar10:data -o policy.safetensors
    """
    from bdtool.training.stages import imitate

    options = _options_from(ImitateOptions, given)
    start, first_trunk, digests = _load_both(base, trunk)
    _run(given, start.spec, digests, lambda place: imitate(start, options, place, trunk=first_trunk))


def _load_both(start: Path, other: Path | None) -> tuple[BlockDropModel, BlockDropModel | None, str]:
    """Return the model that a run starts from, a trunk or teacher where one was given, and their digests."""
    from bdtool.models.store import load_model
    from export.files import sha256_of_file

    digests = " ".join(sha256_of_file(file) for file in (start, other) if file)
    return load_model(start), load_model(other) if other else None, digests


@train_cmd.command("finetune")
@click.argument("start", type=MODEL, metavar="MODEL")
@_options_of(
    FinetuneOptions,
    {
        **_SHARED_HELP,
        **_SGD_HELP,
        **_POLICY_HELP,
        "lr": "Highest learning rate of the policy network, by Adam.",
        "base_lr": "Highest learning rate of the base, by SGD.",
        "policy": "learned, or a heuristic that the base is trained for: first:K, random:K, random:LOW-HIGH, "
        "distribute:K, all, K bits, FILE.npy with one row, or a row for each training image (without --val). "
        "learned:LOW-HIGH with --freeze-policy: paths at all thresholds between these.",
        "freeze_policy": "Leave the policy network as it is: the base learns along the paths that it takes.",
        "blocks": "First shift the policy network to keep this many blocks on average; 0 leaves it.",
    },
)
@click.option(
    "--teacher",
    type=MODEL,
    metavar="MODEL",
    help="A better base, of any architecture, whose answers are learned besides the labels (knowledge distillation).",
)
@_run_options
@_epoch_options
def finetune_cmd(start: Path, teacher: Path | None, **given: Any) -> None:
    """Train base and policy network of MODEL together, or its base alone under a heuristic.

    \b
    Example:
      bdtool train finetune policy.safetensors --data cifar10:data --val cifar10:data -o joint.safetensors
      bdtool train finetune joint.safetensors --freeze-policy --blocks 7 --data cifar10:data -o model.safetensors
      bdtool train finetune base.safetensors --policy distribute:7 --data cifar10:data -o distribute7.safetensors
    """
    from bdtool.training.stages import finetune

    options = _options_from(FinetuneOptions, given)
    model, taught_by, digests = _load_both(start, teacher)
    _run(given, model.spec, digests, lambda place: finetune(model, options, place, teacher=taught_by))


_Options = TypeVar("_Options", bound=StageOptions)


def _options_from(kind: type[_Options], given: dict[str, Any]) -> _Options:
    return kind(**{field.name: given[field.name] for field in dataclasses.fields(kind)})


def _run(given: dict[str, Any], spec: ModelSpec, start: str, stage: Callable[[TrainingPlace], Trained]) -> None:
    """Open the data, train, and print what came out; under torchrun the first process alone speaks."""
    from bdtool.training.distributed import open_group
    from bdtool.training.place import TrainingPlace

    network = _network(spec)
    device = _device(given["device"])
    if given["threads"]:
        import torch

        torch.set_num_threads(given["threads"])
    going_on = {name: given[name] for name in ("resume", "save_every_s") if name in given}
    # only stages that train or follow a policy network have a penalty; of a heuristic the reward says nothing
    rewarded = "gamma" in given and given.get("policy", "learned").startswith("learned")
    with (
        open_group(device) as group,
        logs(given.get("tensorboard") if group.is_first else None, rewarded=rewarded) as log,
    ):
        train, val = _open(given, network)
        with show(enabled=group.is_first, rewarded=rewarded) as (on_step, on_progress):
            trained = stage(
                TrainingPlace(
                    train=train,
                    val=val,
                    output=given["output"],
                    group=group,
                    start=start,
                    on_resume=print_resumed,
                    on_step=on_step,
                    on_progress=on_progress,
                    on_epoch=log,
                    **going_on,
                )
            )
    if group.is_first:
        epochs = [dataclasses.asdict(epoch) for epoch in trained.epochs]
        result = {"model": str(given["output"]), "figures": dict(trained.figures), "epochs": epochs}
        emit(result, given["json_file"], lambda: print_figures(given["output"], trained))


def _network(spec: ModelSpec) -> NetworkSpec:
    from bdtool.models.layout import network_from_spec

    return network_from_spec(spec)


def _open(given: dict[str, Any], network: NetworkSpec) -> tuple[ImageSource, ImageSource | None]:
    from bdtool.data.sources import open_data

    resize = given["resize"] or network.preprocessing.resize is not None
    train = open_data(given["data"], network=network, split="train", resize=resize)
    val = open_data(given["val"], network=network, resize=resize) if given["val"] else None
    return train, val


def _device(name: str) -> torch.device:
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise click.BadParameter(f"{name!r}: expected cpu, cuda or cuda:N", param_hint="'--device'")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise click.BadParameter(
            f"{name}: torch sees no usable GPU here; `bdtool doctor` says why, --device cpu trains without one",
            param_hint="'--device'",
        )
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise click.BadParameter(
            f"{name}: torch sees {counted(torch.cuda.device_count(), 'GPU')} here, counted from cuda:0",
            param_hint="'--device'",
        )
    return device

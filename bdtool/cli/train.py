"""`bdtool train`: pretrain, transfer, deepen, curriculum, imitate, finetune."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdtool.cli.command import Group
from bdtool.cli.options import (
    DATA,
    MODEL,
    NEW_MODEL,
    colour_options,
    refuse_idle,
    resize_to_option,
    size_option,
    was_given,
)
from bdtool.cli.output import emit
from bdtool.cli.training_options import (
    POLICY_HELP,
    SGD_HELP,
    SHARED_HELP,
    epoch_options,
    options_from,
    options_of,
    resume_options,
    run_options,
    trunk_option,
)
from bdtool.cli.training_output import logs, print_figures, print_resumed, show
from bdtool.training.options import CurriculumOptions, FinetuneOptions, ImitateOptions, PretrainOptions
from bdtool.words import counted, listing

if TYPE_CHECKING:
    import torch

    from bdtool.data.batches import ImageSource
    from bdtool.models.model import BlockDropModel
    from bdtool.models.model_spec import ModelSpec
    from bdtool.specs import NetworkSpec
    from bdtool.training.place import TrainingPlace
    from bdtool.training.stages import Trained


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
@options_of(PretrainOptions, {**SHARED_HELP, **SGD_HELP, "compile": "Compile the network with torch.compile."})
@run_options
@epoch_options
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

    options = options_from(PretrainOptions, given)
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


@train_cmd.command("transfer")
@click.argument("source", type=MODEL, metavar="MODEL")
@click.option(
    "--data", type=DATA, metavar="DATA", required=True, help="The images to train on, which say what classes there are."
)
@click.option("--classes", type=click.IntRange(min=1), help="Number of classes, where DATA does not say it.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the new random weights.")
@click.option("-o", "--output", type=NEW_MODEL, required=True, metavar="MODEL", help="The MODEL file to write.")
def transfer_cmd(source: Path, data: str, classes: int | None, seed: int, output: Path) -> None:
    """Give the base of MODEL a new last layer, for the classes of DATA; then train it with `finetune --policy all`.

    What ImageNet's weights see is a better start than random ones where there are few images. A policy network is left
    out, as it decided for other pictures.

    \b
    Example:
      bdtool train transfer resnet50.safetensors --data train -o start.safetensors
      bdtool train finetune start.safetensors --policy all --base-lr 0.01 --data train --val val -o base.safetensors
    """
    from bdtool.models.store import load_model, save_model
    from bdtool.training.base_spec import classes_of
    from bdtool.training.transfer import transfer

    model = load_model(source)
    n_classes, labels = classes_of(data, model.spec.architecture, n_classes=classes)
    save_model(transfer(model, n_classes=n_classes, labels=labels, seed=seed), output)
    names = f" ({listing(labels)})" if labels else ""
    left_out = "; the policy network was left out" if model.spec.has_policy else ""
    click.echo(f"{output}: {model.spec.arch}, {n_classes} classes{names} in place of {model.spec.n_classes}{left_out}")


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
@options_of(
    CurriculumOptions,
    {
        **SHARED_HELP,
        **POLICY_HELP,
        "stage_epochs": "Epochs after which more blocks are learned. Default: so that all are by half of the run.",
        "stage_blocks": "How many more, from the last block to the first.",
    },
)
@trunk_option
@run_options
@epoch_options
def curriculum_cmd(base: Path, trunk: Path | None, **given: Any) -> None:
    """Train a policy network for the base of MODEL, which stays as it is.

    \b
    Example:
      bdtool train curriculum base.safetensors --data cifar10:data --val cifar10:data -o policy.safetensors
      bdtool train curriculum base.safetensors --trunk resnet8.safetensors --data cifar10:data -o policy.safetensors
    """
    from bdtool.training.stages import curriculum

    options = options_from(CurriculumOptions, given)
    start, first_trunk, digests = _load_both(base, trunk)
    _run(given, start.spec, digests, lambda place: curriculum(start, options, place, trunk=first_trunk))


@train_cmd.command("imitate")
@click.argument("base", type=MODEL, metavar="MODEL")
@options_of(
    ImitateOptions,
    {
        **SHARED_HELP,
        "fewest": "Blocks of the easiest images; 0 is a third of the model's.",
        "most": "Blocks of the hardest images; 0 is 0.6 of the model's.",
        "hidden": "Width of a new policy network's hidden layer; 0 for none.",
        "judges": "Training images on which the masks are compared.",
    },
)
@trunk_option
@run_options
@resume_options(save_every_s=60, also="before the result is measured")
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

    options = options_from(ImitateOptions, given)
    start, first_trunk, digests = _load_both(base, trunk)
    if start.spec.has_policy and first_trunk is None and options.hidden != start.spec.policy_hidden:
        refuse_idle(["hidden"], f"{base} has a policy network already. Give a --trunk for a new one, or leave it out")
    _run(given, start.spec, digests, lambda place: imitate(start, options, place, trunk=first_trunk))


def _load_both(start: Path, other: Path | None) -> tuple[BlockDropModel, BlockDropModel | None, str]:
    """Return the model that a run starts from, a trunk or teacher where one was given, and their digests."""
    from bdtool.models.store import load_model
    from export.files import sha256_of_file

    digests = " ".join(sha256_of_file(file) for file in (start, other) if file)
    return load_model(start), load_model(other) if other else None, digests


@train_cmd.command("finetune")
@click.argument("start", type=MODEL, metavar="MODEL")
@options_of(
    FinetuneOptions,
    {
        **SHARED_HELP,
        **SGD_HELP,
        **POLICY_HELP,
        "lr": "Highest learning rate of the policy network, by Adam.",
        "base_lr": "Highest learning rate of the base, by SGD.",
        "policy": "learned, or a heuristic that the base is trained for: first:K, random:K, random:LOW-HIGH, "
        "distribute:K, all, K bits, FILE.npy with one row, or a row for each training image (without --val). "
        "learned:LOW-HIGH with --freeze-policy: paths at all thresholds between these. A base that was trained for one "
        "mask goes on with it, where nothing is given.",
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
@run_options
@epoch_options
def finetune_cmd(start: Path, teacher: Path | None, **given: Any) -> None:
    """Train base and policy network of MODEL together, or its base alone under a heuristic.

    \b
    Example:
      bdtool train finetune policy.safetensors --data cifar10:data --val cifar10:data -o joint.safetensors
      bdtool train finetune joint.safetensors --freeze-policy --blocks 7 --data cifar10:data -o model.safetensors
      bdtool train finetune base.safetensors --policy distribute:7 --data cifar10:data -o distribute7.safetensors
    """
    from bdtool.models.store import read_spec
    from bdtool.training.stages import finetune

    if not was_given("policy"):
        given["policy"] = read_spec(start).mask or given["policy"]
    options = options_from(FinetuneOptions, given)
    if not options.trains_policy:
        follows_network = options.policy.startswith("learned")  # whose reward is shown, with this gamma
        refuse_idle(
            ["lr", "alpha", "entropy", *([] if follows_network else ["gamma"])],
            "the policy network does not learn; leave it out. The base's learning rate is --base-lr",
        )
    model, taught_by, digests = _load_both(start, teacher)
    _run(given, model.spec, digests, lambda place: finetune(model, options, place, teacher=taught_by))


def _run(given: dict[str, Any], spec: ModelSpec, start: str, stage: Callable[[TrainingPlace], Trained]) -> None:
    """Open the data, train, and print what came out; under torchrun the first process alone speaks."""
    from bdtool.training.classes import warn_of_classes_without_images
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
        if group.is_first:
            warn_of_classes_without_images(train, network)
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

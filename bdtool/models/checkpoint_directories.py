"""Directories as Hugging Face's hub keeps models: the weights, and JSON files that say what they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bdtool.errors import UsageError
from bdtool.models import hub_timm, hub_transformers
from bdtool.models.architectures import Architecture
from bdtool.models.checkpoint_formats import GivenInput
from bdtool.models.hub_settings import HubSettings

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what both libraries write, the newer name first
_CONFIG = "config.json"
_PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True)
class HubDirectory:
    """What a directory says of labels and of the network's input.

    `input_file` is the name of the file that says all of the latter; None: none does.
    """

    labels: tuple[str, ...] | None
    told: GivenInput
    input_file: str | None


def weights_file(directory: Path) -> Path:
    """Return the file of weights in a directory.

    Raises:
        UsageError: there is none.
    """
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    raise UsageError(
        f"{directory} is a directory without {' or '.join(_WEIGHTS)}, which those of Hugging Face's hub have; "
        "expected one, or a checkpoint's file"
    )


def read_directory(directory: Path, arch: Architecture, *, given: GivenInput) -> HubDirectory:
    """Return what a directory says of its weights; a file that is not there says nothing.

    Args:
        directory: as timm's `save_for_hf`, `save_pretrained` of transformers, or a download of theirs leaves it.
        arch: what the network is to be.
        given: what the user says of the input, which wins.

    Raises:
        CheckpointError: a file that cannot be read, or a network or pictures that bdtool does not have.
    """
    config, processor = HubSettings.read(directory / _CONFIG), HubSettings.read(directory / _PROCESSOR)
    if config is not None and hub_timm.is_timm(config):
        hub_timm.require_network(config, arch)
        labels, told, source = hub_timm.labels(config), hub_timm.network_input(config, given=given), _CONFIG
    else:
        if config is not None:
            hub_transformers.require_network(config)
        labels = None if config is None else hub_transformers.labels(config)
        told = GivenInput() if processor is None else hub_transformers.network_input(processor, given=given)
        source = _PROCESSOR
    is_whole = None not in (told.mean, told.std, told.resize, told.interpolation)
    return HubDirectory(labels=labels, told=told, input_file=source if is_whole else None)


def completed(given: GivenInput, told: GivenInput) -> GivenInput:
    """Return what is given, and of the rest what was told, its `resize` in proportion to a `size` that is given."""
    resize = told.resize
    if resize is not None and given.size is not None and told.size is not None:
        resize = round(resize * given.size / told.size)
    return GivenInput(
        mean=given.mean or told.mean,
        std=given.std or told.std,
        size=given.size or told.size,
        resize=given.resize or resize,
        interpolation=given.interpolation or told.interpolation,
    )

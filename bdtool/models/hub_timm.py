"""What the `config.json` of timm's models says; transformers writes the same of those that it wraps."""

from __future__ import annotations

from typing import get_args

from bdtool.models.architectures import Architecture
from bdtool.models.checkpoint_formats import GivenInput
from bdtool.models.hub_settings import WHERE_HARMLESS, HubSettings
from bdtool.specs import Interpolation

# Where the file says nothing, timm's own defaults:
_CROP = 0.875
_INTERPOLATION: Interpolation = "bicubic"
# Arguments that a model was made with and that leave its layers as they are.
_HARMLESS = {"num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "drop_block_rate"}
_INTERPOLATIONS: dict[str, Interpolation] = {name: name for name in get_args(Interpolation)}


def is_timm(config: HubSettings) -> bool:
    """Say whether the configuration is of one of timm's models."""
    return "architecture" in config.values


def require_network(config: HubSettings, arch: Architecture) -> None:
    """Refuse what differs from `arch` without a trace in the tensors, such as the blurred strides of resnetaa50.

    Raises:
        CheckpointError: it does.
    """
    if config.values["architecture"] != arch.name:
        name = config.values["architecture"]
        raise config.problem(
            f"architecture is {name!r}, which is another network than {arch.name!r}; `bdtool models` lists ours"
        )
    arguments = config.inner("model_args")
    if unknown := sorted(arguments.values.keys() - _HARMLESS):
        raise config.problem(
            f"model_args has {', '.join(unknown)}, which may change what the layers do. {WHERE_HARMLESS}"
        )
    for settings in (config, arguments):
        settings.require("global_pool", "avg")


def labels(config: HubSettings) -> tuple[str, ...] | None:
    """Return the names of the classes, where they are listed."""
    cfg = _pretrained(config).values
    names = config.values.get("label_names", cfg.get("label_names", cfg.get("labels")))  # the last: older files
    return tuple(map(str, names)) if isinstance(names, list) else None


def network_input(config: HubSettings, *, given: GivenInput) -> GivenInput:
    """Return how pictures become the input: scaled to `input_size / crop_pct`, as timm's own evaluation does.

    Raises:
        CheckpointError: bdtool does not have that, and what is `given` does not replace it.
    """
    cfg = _pretrained(config)
    side = _side(cfg)
    resize = None if side is None else int(side / cfg.share("crop_pct", _CROP))
    if cfg.values.get("crop_mode", "center") != "center":
        resize = cfg.resize_asked_for("crop_mode", side, given)
    return GivenInput(
        mean=cfg.colour("mean"),
        std=cfg.colour("std"),
        size=side,
        resize=resize,
        interpolation=cfg.interpolation("interpolation", _INTERPOLATIONS, given) or _INTERPOLATION,
    )


def _pretrained(config: HubSettings) -> HubSettings:
    """Return what is said of the weights: in older files beside the architecture."""
    return config.inner("pretrained_cfg") if "pretrained_cfg" in config.values else config


def _side(cfg: HubSettings) -> int | None:
    size = cfg.values.get("input_size")
    match size:
        case None:
            return None
        case [3, int(height), width] if height == width and height > 0:
            return height
    raise cfg.problem(f"input_size is {size!r}, expected 3 channels of a square")

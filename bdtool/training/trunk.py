"""A policy network that starts from a trained classifier of its own architecture."""

from __future__ import annotations

import logging

import numpy as np

from bdtool.errors import UsageError
from bdtool.models.architectures import architecture, policy_downscale, policy_trunk
from bdtool.models.checkpoint_formats import Colour
from bdtool.models.model import BlockDropModel
from bdtool.models.model_spec import ModelSpec
from bdtool.specs import Preprocessing

logger = logging.getLogger(__name__)
_SAME_COLOUR = 1e-3  # of pixels from 0 to 1: a quarter of a grey level, as means are often given rounded


def start_from_trunk(model: BlockDropModel, trunk: BlockDropModel) -> None:
    """Give the policy network of `model` the weights of `trunk`, all but its classifier.

    Logs a warning where they look at whole images, and the paper's policy network of that family does not, and where
    `trunk` was made for pictures scaled otherwise: its features are less sure of them, but not wrong.

    Raises:
        UsageError: `trunk` has another architecture or shortcut than the policy network, or another input; or it was
            trained for one mask.
    """
    assert model.spec.policy_downscale == trunk.spec.downscale
    assert model.policy is not None
    family = architecture(model.spec.arch).family
    layout = policy_trunk(family)
    wanted, got = (layout.name, layout.default_shortcut), (trunk.spec.arch, trunk.spec.shortcut)
    if got != wanted:
        raise UsageError(
            f"trunk: got {got[0]} with shortcut {got[1]}, expected {wanted[0]} with {wanted[1]}, which the policy "
            f"network of {model.spec.arch} is; make one with {command_for_trunk(model.spec)}"
        )
    if trunk.spec.mask is not None:
        raise UsageError(
            f"trunk: got one that was trained for the mask {trunk.spec.mask}, and a policy network runs all of its "
            f"blocks; make another with {command_for_trunk(model.spec)}"
        )
    _check_trunk_input(model.spec.preprocessing, trunk.spec)
    _warn_of_other_scaling(model.spec.preprocessing, trunk.spec)
    usual = policy_downscale(family)
    if trunk.spec.downscale < usual:
        logger.warning(
            "trunk: the policy network will look at whole images, as it does, for %d times the FLOPs of the paper's; "
            "make one like the paper's with %s",
            usual**2,
            command_for_trunk(model.spec),
        )
    weights = {name: tensor for name, tensor in trunk.base.state_dict().items() if not name.startswith("head.linear.")}
    model.policy.trunk.load_state_dict(weights)


def command_for_trunk(spec: ModelSpec) -> str:
    """Return the command that makes a trunk for the policy network of such a base, in backquotes."""
    family = architecture(spec.arch).family
    return _command(policy_trunk(family).name, policy_downscale(family), spec.preprocessing)


def _check_trunk_input(wanted: Preprocessing, trunk: ModelSpec) -> None:
    """Refuse a trunk that learned from other numbers than base and policy network get, as its features would be off."""
    got = trunk.preprocessing
    distances = np.subtract((*wanted.mean, *wanted.std), (*got.mean, *got.std))
    if (wanted.height, wanted.width) == (got.height, got.width) and np.abs(distances).max() <= _SAME_COLOUR:
        return
    raise UsageError(
        f"trunk: got one for {_input(got)}; expected {_input(wanted)}, which the model takes. Make one with "
        + _command(trunk.arch, trunk.downscale, wanted)
    )


def _warn_of_other_scaling(wanted: Preprocessing, trunk: ModelSpec) -> None:
    got = trunk.preprocessing
    if (got.resize, got.interpolation) == (wanted.resize, wanted.interpolation):
        return
    # pretrain has no --interpolation: it makes no trunk that is alike in that
    remedy = f"; {_command(trunk.arch, trunk.downscale, wanted)} makes one" if got.resize != wanted.resize else ""
    logger.warning(
        "trunk: got one for pictures %s, the model takes them %s; its features may fit them less well than those of a "
        "trunk scaled alike%s",
        _scaling(got),
        _scaling(wanted),
        remedy,
    )


def _scaling(preprocessing: Preprocessing) -> str:
    if preprocessing.resize is None:
        return "as they are"
    return f"scaled to {preprocessing.resize} pixels ({preprocessing.interpolation})"


def _command(arch: str, downscale: int, wanted: Preprocessing) -> str:
    """Return the command that makes a trunk for the input of a model, in backquotes."""
    factor = f" --downscale {downscale}" if downscale > 1 else ""
    colours = f"--mean {_numbers(wanted.mean)} --std {_numbers(wanted.std)}"
    resize = f" --resize-to {wanted.resize}" if wanted.resize is not None else ""
    return f"`bdtool train pretrain --arch {arch}{factor} {colours} --size {wanted.height}{resize}`"


def _input(preprocessing: Preprocessing) -> str:
    size = f"{preprocessing.height} x {preprocessing.width} pixels"
    return f"{size} with mean {_numbers(preprocessing.mean)} and std {_numbers(preprocessing.std)}"


def _numbers(colour: Colour) -> str:
    return ",".join(f"{value:.6g}" for value in colour)

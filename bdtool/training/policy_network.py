"""A model's policy network: added to its base, or left out."""

from __future__ import annotations

import dataclasses

from torch import nn

from bdtool.models.layout import network_from_spec
from bdtool.models.model import BlockDropModel, build_model
from bdtool.training.trunk import start_from_trunk

_FIRST_LOGIT = 1.5  # of a new policy network: P(keep) = 0.82


def with_policy(
    model: BlockDropModel, *, seed: int, n_hidden: int = 0, trunk: BlockDropModel | None = None
) -> BlockDropModel:
    """Return a model with the base of `model` and a policy network: its own, or a new one that keeps most blocks.

    With a `trunk`, of which a new one starts, it is always new.

    A new one starts at P(keep) of about 0.8, where the authors' starts at 0.5: a block that the curriculum reaches then
    starts from what it did before, kept, instead of being dropped for half of the images.

    Raises:
        UsageError: as `start_from_trunk`, or no new policy network takes images of this size.
    """
    if model.policy is not None and trunk is None:
        return model
    spec = dataclasses.replace(model.spec, has_policy=True, policy_hidden=n_hidden, mask=None)
    if trunk is not None:
        spec = dataclasses.replace(spec, policy_downscale=trunk.spec.downscale)
    network_from_spec(spec)  # refuse a size that the policy network cannot take
    grown = build_model(spec, seed=seed)
    grown.base.load_state_dict(model.base.state_dict())
    assert grown.policy is not None
    nn.init.constant_(grown.policy.logit.bias, _FIRST_LOGIT)
    if trunk is not None:
        start_from_trunk(grown, trunk)
    return grown


def without_policy(model: BlockDropModel, *, mask: str | None = None) -> BlockDropModel:
    """Return a model with the base of `model` alone, and the keep bits of the one mask that it is trained for."""
    bare = build_model(
        dataclasses.replace(model.spec, has_policy=False, policy_hidden=0, policy_downscale=0, mask=mask)
    )
    bare.base.load_state_dict(model.base.state_dict())
    return bare

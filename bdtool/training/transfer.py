"""A base for other classes, which begins with what a trained one sees: transfer learning's new last layer."""

from __future__ import annotations

import dataclasses

from bdtool.models.model import BlockDropModel, build_model
from bdtool.training.provenance import versions


def transfer(
    model: BlockDropModel, *, n_classes: int, labels: tuple[str, ...] | None = None, seed: int = 0
) -> BlockDropModel:
    """Return the base of `model` with a new last layer of random weights, in eval mode, without a policy network.

    All else, the preprocessing included, stays as it is.

    Args:
        labels: names of the classes, where they have some.
        seed: makes the new weights reproducible.
    """
    provenance = {
        "created_by": "bdtool train transfer",
        "seed": seed,
        "versions": versions(),
        "start": dict(model.spec.provenance),
    }
    spec = dataclasses.replace(
        model.spec,
        n_classes=n_classes,
        labels=labels,
        has_policy=False,
        policy_hidden=0,
        policy_downscale=0,
        provenance=provenance,
    )
    transferred = build_model(spec, seed=seed)
    transferred.base.stem.load_state_dict(model.base.stem.state_dict())
    transferred.base.blocks.load_state_dict(model.base.blocks.state_dict())
    return transferred

"""A deeper base that computes nearly what a shallower one does: where to begin when there are no weights of its depth.

Source: Chang, Meng, Haber et al., "Multi-level Residual Networks from Dynamical Systems View", ICLR 2018. A residual
block is seen as a step of an explicit Euler scheme, so several that go the same way, each a part of its length, lead to
nearly the same place.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from bdtool.errors import UsageError
from bdtool.models.architectures import Architecture, architecture
from bdtool.models.model import BlockDropModel, build_model
from bdtool.training.provenance import versions


def deepen(model: BlockDropModel, arch: str) -> BlockDropModel:
    """Return the base of `model` with more blocks, in eval mode, without a policy network.

    The first block of a stage stays, as it may change the shape. Each other one is repeated, evenly, and its residual
    branch divided by the number of repetitions.

    Args:
        arch: of the same kind of blocks, with no fewer of them in any stage.

    Raises:
        UsageError: `arch` does not exist, does not go on from the architecture of `model`, or has more blocks in a
            stage of which `model` has the first alone; or `model` was trained for one mask.
    """
    if model.spec.mask is not None:
        raise UsageError(
            f"the base was trained for the mask {model.spec.mask} alone, so that its other blocks are no start; give a "
            "MODEL that was trained with every block"
        )
    shallow, deep = model.spec.architecture, architecture(arch)
    _check_goes_on(shallow, deep)
    provenance = {
        "created_by": "bdtool train deepen",
        "versions": versions(),
        "start": dict(model.spec.provenance),
    }
    spec = dataclasses.replace(
        model.spec, arch=arch, has_policy=False, policy_hidden=0, policy_downscale=0, provenance=provenance
    )
    deeper = build_model(spec)
    deeper.base.stem.load_state_dict(model.base.stem.state_dict())
    deeper.base.head.load_state_dict(model.base.head.state_dict())
    sources = block_sources(shallow.stages, deep.stages)
    n_copies = Counter(sources)
    last = "bn3" if deep.block == "bottleneck" else "bn2"
    for block, source in zip(deeper.base.blocks, sources, strict=True):
        state = model.base.blocks[source].state_dict()
        shared = {name: state[name] / n_copies[source] for name in (f"{last}.weight", f"{last}.bias")}
        block.load_state_dict({**state, **shared})
    return deeper


def block_sources(shallow: tuple[int, ...], deep: tuple[int, ...]) -> list[int]:
    """Return which block each of the deeper network comes from.

    Args:
        shallow, deep: blocks of each stage, as many stages; 2 or more where `deep` has more.
    """
    sources: list[int] = []
    first = 0
    for n_from, n_to in zip(shallow, deep, strict=True):
        sources.append(first)
        sources += [first + 1 + k * (n_from - 1) // (n_to - 1) for k in range(n_to - 1)]
        first += n_from
    return sources


def _check_goes_on(shallow: Architecture, deep: Architecture) -> None:
    if _blocks(shallow) != _blocks(deep):
        raise UsageError(
            f"{deep.name} has {_blocks(deep)}, {shallow.name} {_blocks(shallow)}; give an architecture of the same"
        )
    stages = f"{shallow.name} has {_joined(shallow.stages)} blocks, {deep.name} {_joined(deep.stages)}"
    if shallow.n_blocks >= deep.n_blocks or any(a > b for a, b in zip(shallow.stages, deep.stages, strict=True)):
        raise UsageError(f"{stages}; give an architecture with more, and with no fewer in any stage")
    if any(a == 1 < b for a, b in zip(shallow.stages, deep.stages, strict=True)):
        raise UsageError(
            f"{stages}; the first block of a stage is not repeated, and there is no other. Give a MODEL with 2 or more"
        )


def _blocks(arch: Architecture) -> str:
    """Say what an architecture's blocks are like, however many there are."""
    groups = f" in {arch.groups} groups" if arch.groups > 1 else ""
    return f"{arch.block} blocks of {_joined(arch.widths)} channels{groups} ({arch.family})"


def _joined(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))

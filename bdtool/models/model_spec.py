"""What a MODEL is, as plain data. Loads no torch, so that `bdtool inspect` and `bdtool models` stay quick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from bdtool.errors import UsageError
from bdtool.models.architectures import Architecture, ShortcutKind, architecture, policy_downscale
from bdtool.specs import Preprocessing, require_mask


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything about a model but its weights.

    `policy_hidden` is the width of the policy network's hidden layer, 0 for none. Base and policy network first average
    `downscale` x `downscale` and `policy_downscale` x `policy_downscale` pixels into one; 0 for the latter becomes the
    paper's, 1 for CIFAR's architectures and 2 for ImageNet's. `mask` is for a base that was trained for one mask: its
    keep bits, block 0 first. `provenance` says how the weights came to be, as JSON values; it holds no time stamps, so
    that equal input gives equal files.
    """

    arch: str
    n_classes: int
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing
    shortcut: ShortcutKind
    has_policy: bool
    provenance: Mapping[str, Any]
    policy_hidden: int = 0
    downscale: int = 1
    policy_downscale: int = 0
    mask: str | None = None

    def __post_init__(self) -> None:
        if self.policy_downscale == 0:
            object.__setattr__(self, "policy_downscale", policy_downscale(self.architecture.family))
        if self.n_classes < 1:
            raise UsageError(f"{self.arch}: {self.n_classes} classes; a model needs at least one")
        if self.policy_hidden < 0:
            raise UsageError(f"{self.arch}: policy_hidden {self.policy_hidden}; give a width, or 0 for no hidden layer")
        for name, factor in (("downscale", self.downscale), ("policy_downscale", self.policy_downscale)):
            if factor < 1:
                raise UsageError(f"{self.arch}: {name} {factor}; give 1 for whole images, or by what to divide them")
        if self.labels is not None and len(self.labels) != self.n_classes:
            raise UsageError(f"{self.arch}: {len(self.labels)} labels for {self.n_classes} classes; give one for each")
        if self.shortcut not in get_args(ShortcutKind):
            raise UsageError(f"unknown shortcut {self.shortcut!r}; known: {', '.join(get_args(ShortcutKind))}")
        try:
            require_mask(self.mask, n_blocks=self.architecture.n_blocks, has_policy=self.has_policy)
        except ValueError as exc:
            raise UsageError(f"{self.arch}: {exc}") from exc

    @property
    def architecture(self) -> Architecture:
        return architecture(self.arch)

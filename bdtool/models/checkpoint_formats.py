"""The layouts of public ResNet checkpoints: how each names the tensors that we call `base.blocks.3.conv1.weight`.

| format | where from | networks |
|---|---|---|
| akamaster | github.com/akamaster/pytorch_resnet_cifar10 | CIFAR |
| torchvision | torchvision.models.resnet*; timm's have the same keys | ImageNet |
| transformers | Hugging Face's transformers, `ResNetForImageClassification` | ImageNet |
| blockdrop | github.com/Tushar-N/blockdrop, `finetune.py`: ResNet and policy network in one file | both |
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from bdtool.errors import UsageError
from bdtool.models.architectures import Architecture, Family, ShortcutKind, policy_trunk
from bdtool.specs import Interpolation, Preprocessing

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

FormatName = Literal["akamaster", "torchvision", "transformers", "blockdrop"]
Colour = tuple[float, float, float]

IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)
# BlockDrop's utils.py, get_transforms: "Only the R32 pretrained model subtracts the mean"
CIFAR10_MEAN: Colour = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR10_STD: Colour = (63.0 / 255, 62.1 / 255, 66.7 / 255)

_IMAGENET_RESIZE = 256 / 224  # the shorter side to the input, its middle

CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """How a project names its tensors.

    `{layer}` counts stages from 1, `{stage}` from 0, `{i}` blocks in a stage. Of a convolution or batch normalisation
    `{kind}` is the word for it, and its number counts from 1 as `{n}`, from 0 as `{m}`; in a projection `{m}` is 0 for
    the convolution and 1 for the other.
    """

    name: FormatName
    families: tuple[Family, ...]
    conv: str = "conv"  # the words for `{kind}`
    bn: str = "bn"
    stem: str = "{kind}1"
    block: str  # what the keys of a block begin with
    residual: str = "{kind}{n}"  # and how those of its residual branch go on
    projection: str
    head: str
    base_prefix: str = ""  # of all but the head's
    cifar_shortcut: ShortcutKind

    def shortcut(self, arch: Architecture) -> ShortcutKind:
        """Return the shortcut kind that networks of this format have, unless told otherwise."""
        return self.cifar_shortcut if arch.family == "cifar" else arch.default_shortcut

    def key(self, name: str, arch: Architecture, *, policy_prefix: str) -> str:
        """Return this format's key for our tensor name, such as `policy.trunk.blocks.0.bn1.weight`."""
        if name.startswith("policy.logit."):
            return policy_prefix + name.removeprefix("policy.")
        if name.startswith("policy.trunk."):
            stages = policy_trunk(arch.family).stages
            return f"{policy_prefix}features." + self._network_key(name.removeprefix("policy.trunk."), stages)
        if name.startswith("base.head.linear."):
            return self.head + "." + name.removeprefix("base.head.linear.")
        return self.base_prefix + self._network_key(name.removeprefix("base."), arch.stages)

    def _network_key(self, name: str, stages: tuple[int, ...]) -> str:
        """Translate a name inside one ResNet: "stem.bn.weight", "blocks.7.bn2.bias", "blocks.7.shortcut.bn.bias"."""
        *room, module, tensor = name.split(".")
        is_bn = module.startswith("bn")
        kind = self.bn if is_bn else self.conv
        if room == ["stem"]:
            return self.stem.format(kind=kind) + f".{tensor}"
        stage, i = _place(int(room[1]), stages)
        place = {"layer": stage + 1, "stage": stage, "i": i, "kind": kind}
        if room[-1] == "shortcut":
            return self.projection.format(m=int(is_bn), **place) + f".{tensor}"
        n = int(module[-1])
        return f"{self.block}.{self.residual}".format(n=n, m=n - 1, **place) + f".{tensor}"


AKAMASTER = CheckpointFormat(
    name="akamaster",
    families=("cifar",),
    block="layer{layer}.{i}",
    projection="layer{layer}.{i}.shortcut.{m}",
    head="linear",
    cifar_shortcut="option-a",
)
TORCHVISION = CheckpointFormat(
    name="torchvision",
    families=("imagenet",),
    block="layer{layer}.{i}",
    projection="layer{layer}.{i}.downsample.{m}",
    head="fc",
    cifar_shortcut="projection",
)
TRANSFORMERS = CheckpointFormat(
    name="transformers",
    families=("imagenet",),
    conv="convolution",
    bn="normalization",
    stem="embedder.embedder.{kind}",
    block="encoder.stages.{stage}.layers.{i}",
    residual="layer.{m}.{kind}",
    projection="encoder.stages.{stage}.layers.{i}.shortcut.{kind}",
    head="classifier.1",
    base_prefix="resnet.",
    cifar_shortcut="projection",
)
BLOCKDROP = CheckpointFormat(
    name="blockdrop",
    families=("cifar", "imagenet"),
    block="blocks.{stage}.{i}",
    projection="ds.{stage}.{m}",
    head="resnet.fc",
    base_prefix="resnet.",
    cifar_shortcut="average-pool",
)
FORMATS = {fmt.name: fmt for fmt in (AKAMASTER, TORCHVISION, TRANSFORMERS, BLOCKDROP)}


@dataclass(frozen=True, kw_only=True)
class GivenInput:
    """What a user says of a network's input, in place of what is usual; None: nothing.

    `size` is height and width, the others as of `Preprocessing`. Without a `resize`, pictures for ImageNet's networks
    are scaled as 256 to 224 pixels.
    """

    mean: Colour | None = None
    std: Colour | None = None
    size: int | None = None
    resize: int | None = None
    interpolation: Interpolation | None = None


def find_format(name: str) -> CheckpointFormat:
    """Return the format called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown checkpoint format {name!r}; known: auto, {', '.join(FORMATS)}")
    return FORMATS[name]


def detect_format(keys: Collection[str]) -> CheckpointFormat | None:
    """Return the format that tensors of these names belong to, or None where they look like no known one."""
    tops = {key.partition(".")[0] for key in keys}
    if {"resnet", "classifier"} <= tops:
        return TRANSFORMERS
    if tops & {"resnet", "agent", "net"}:
        return BLOCKDROP
    if "layer1" not in tops:
        return None
    return AKAMASTER if "linear" in tops else TORCHVISION if "fc" in tops else None


def default_preprocessing(
    fmt: CheckpointFormat,
    arch: Architecture,
    *,
    n_classes: int,
    given: GivenInput,
) -> Preprocessing:
    """Return the input format that these networks were trained with; what is given replaces its values.

    Raises:
        ValueError: what is given is impossible.
    """
    usual_mean, usual_std = IMAGENET_MEAN, IMAGENET_STD
    if fmt is BLOCKDROP and arch.family == "cifar":
        usual_mean, usual_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if arch.name == "resnet32" and n_classes == 10:
            usual_mean, usual_std = CIFAR10_MEAN, CIFAR10_STD
    side = given.size or arch.image_size
    if given.resize is not None and given.resize < side:
        raise ValueError(
            f"--resize-to {given.resize}: pictures scaled to that would have black borders in an input of {side} x "
            f"{side} pixels; give {side} or more, or a --size of {given.resize} or less"
        )
    return Preprocessing(
        height=side,
        width=side,
        mean=given.mean or usual_mean,
        std=given.std or usual_std,
        resize=given.resize or (round(side * _IMAGENET_RESIZE) if arch.family == "imagenet" else None),
        interpolation=given.interpolation or "bilinear",
    )


def published_weights(arch: Architecture, sha256: str) -> WeightsEnum | None:
    """Return which of torchvision's weights a file of that digest is; None: none of them.

    The names of its files end with the first digits of their digests. They differ in how pictures are scaled: the older
    ones were measured at 256 pixels, those trained by its newer recipe (V2, and V1 of ResNeXt-101 64x4d) at 232.
    """
    from torchvision.models import get_model_weights

    try:
        known = get_model_weights(arch.name)
    except ValueError:  # of other architectures
        return None
    return next((weights for weights in known if PurePosixPath(weights.url).stem.endswith(f"-{sha256[:8]}")), None)


def published_resize(weights: WeightsEnum, *, size: int | None) -> int:
    """Return what pictures are scaled to where torchvision measured these weights, or as much more as `size` is."""
    transforms = weights.transforms()
    [resize], [usual] = transforms.resize_size, transforms.crop_size
    wanted: int = round(resize * (size or usual) / usual)
    return wanted


def default_labels(arch: Architecture, *, n_classes: int) -> tuple[str, ...] | None:
    """Return CIFAR-10's or ImageNet's class names where the number of classes fits, else None."""
    if arch.family == "cifar" and n_classes == len(CIFAR10_LABELS):
        return CIFAR10_LABELS
    if arch.family == "imagenet" and n_classes == 1000:
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return None


def _place(k: int, stages: tuple[int, ...]) -> tuple[int, int]:
    """Return stage and position in it of block `k`."""
    for stage, n_blocks in enumerate(stages):
        if k < n_blocks:
            return stage, k
        k -= n_blocks
    raise AssertionError(f"block beyond the stages {stages}")

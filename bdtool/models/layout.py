"""The layers of a model as plain data: what each part holds, gives and costs. Loads no torch.

The modules of `bdtool.models.resnet` and `bdtool.models.policy` compute what is described here; the tests compare the
two, tensor by tensor and part by part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from bdtool.errors import UsageError
from bdtool.models.architectures import Architecture, ShortcutKind, policy_trunk
from bdtool.models.difference import COUNTER
from bdtool.models.model_spec import ModelSpec
from bdtool.specs import BATCH_AXIS, NetworkSpec, PartKind, PartSpec, TensorSpec

_Shape = tuple[int, ...]  # of one image's activation: channels, height, width, or features

# kind -> what it reads and writes, and the names of its input and output tensor
_WIRING: dict[PartKind, tuple[str, str, str, str]] = {
    "policy": ("image", "keep_probability", "image", "keep_probability"),
    "stem": ("image", "x", "image", "y"),
    "block": ("x", "x", "x", "y"),
    "shortcut": ("x", "x", "x", "y"),
    "head": ("x", "logits", "x", "logits"),
}


def network_from_spec(spec: ModelSpec) -> NetworkSpec:
    """Return the parts of a model with their shapes and FLOPs (2 x multiply-accumulates, see `PartSpec`).

    Raises:
        UsageError: no network of this layout takes images of this size.
    """
    return NetworkSpec(
        arch=spec.arch,
        n_classes=spec.n_classes,
        labels=spec.labels,
        preprocessing=spec.preprocessing,
        stages=spec.architecture.stages,
        parts=tuple(part.spec for part in _parts(spec)),
        mask=spec.mask,
    )


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model's state dict, by name.

    Raises:
        UsageError: as `network_from_spec`.
    """
    return {name: shape for part in _parts(spec) for name, shape in part.tensors.items()}


def part_name(kind: PartKind, index: int | None, n_blocks: int) -> str:
    """Return the name of a part: its kind, and the block's number with as many digits as the last one has."""
    return kind if index is None else f"{kind}_{index:0{max(2, len(str(n_blocks - 1)))}}"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A part, and the tensors that are its own: a shortcut's belong to its block."""

    spec: PartSpec
    tensors: dict[str, _Shape]


class _Layers:
    """Counts layers as they are listed: tensors by name, FLOPs of one image. Each method returns its output's shape."""

    def __init__(self) -> None:
        self.tensors: dict[str, _Shape] = {}
        self.flops = 0

    def conv(self, name: str, x: _Shape, n_out: int, *, kernel: int, stride: int = 1, groups: int = 1) -> _Shape:
        """A convolution without bias, padded by half its kernel, which is odd."""
        n_in, height, width = x
        y = (n_out, -(-height // stride), -(-width // stride))
        self.tensors[f"{name}.weight"] = (n_out, n_in // groups, kernel, kernel)
        self.flops += 2 * (n_in // groups) * kernel**2 * prod(y)
        return y

    def batch_norm(self, name: str, n_channels: int) -> None:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            self.tensors[f"{name}.{tensor}"] = (n_channels,)
        self.tensors[f"{name}.{COUNTER}"] = ()

    def linear(self, name: str, n_in: int, n_out: int) -> _Shape:
        self.tensors |= {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}
        self.flops += 2 * n_in * n_out
        return (n_out,)


def _parts(spec: ModelSpec) -> Iterator[_Part]:
    arch, size = spec.architecture, spec.preprocessing
    image = (3, size.height, size.width)
    if spec.has_policy:
        layers = _Layers()
        yield _part(spec, "policy", None, image, _policy(layers, spec, image), layers)
    layers = _Layers()
    x = _stem(layers, "base.stem", arch, _downscaled(image, spec.downscale))
    yield _part(spec, "stem", None, image, x, layers)
    for k, (stage, stride) in enumerate(_stages_and_strides(arch)):
        layers, shortcut = _Layers(), _Layers()
        y = _block(layers, f"base.blocks.{k}", arch, x, stage=stage, stride=stride)
        changes = _shortcut(shortcut, f"base.blocks.{k}.shortcut", spec.shortcut, x, y, stride=stride)
        layers.tensors |= shortcut.tensors
        layers.flops += shortcut.flops
        yield _part(spec, "block", k, x, y, layers)
        if changes:
            shortcut.tensors = {}
            yield _part(spec, "shortcut", k, x, y, shortcut)
        x = y
    layers = _Layers()
    yield _part(spec, "head", None, x, layers.linear("base.head.linear", x[0], spec.n_classes), layers)


def _part(spec: ModelSpec, kind: PartKind, index: int | None, x: _Shape, y: _Shape, layers: _Layers) -> _Part:
    reads, writes, input_name, output_name = _WIRING[kind]
    part = PartSpec(
        name=part_name(kind, index, spec.architecture.n_blocks),
        kind=kind,
        index=index,
        reads=(reads,),
        writes=(writes,),
        inputs=(TensorSpec(name=input_name, shape=(BATCH_AXIS, *x)),),
        outputs=(TensorSpec(name=output_name, shape=(BATCH_AXIS, *y)),),
        flops=layers.flops,
    )
    return _Part(spec=part, tensors=layers.tensors)


def _policy(layers: _Layers, spec: ModelSpec, image: _Shape) -> _Shape:
    trunk = policy_trunk(spec.architecture.family)
    x = _stem(layers, "policy.trunk.stem", trunk, _downscaled(image, spec.policy_downscale))
    for k, (stage, stride) in enumerate(_stages_and_strides(trunk)):
        name = f"policy.trunk.blocks.{k}"
        y = _block(layers, name, trunk, x, stage=stage, stride=stride)
        _shortcut(layers, f"{name}.shortcut", trunk.default_shortcut, x, y, stride=stride)
        x = y
    features = x[:1]
    if spec.policy_hidden:
        features = layers.linear("policy.hidden", features[0], spec.policy_hidden)
    return layers.linear("policy.logit", features[0], spec.architecture.n_blocks)


def _downscaled(image: _Shape, factor: int) -> _Shape:
    channels, height, width = image
    if min(height, width) < factor:
        raise UsageError(
            f"images of {height} x {width} pixels cannot be scaled down by {factor}; choose a smaller factor"
        )
    return (channels, height // factor, width // factor)


def _stem(layers: _Layers, name: str, arch: Architecture, image: _Shape) -> _Shape:
    imagenet, width = arch.family == "imagenet", arch.stem_width
    x = layers.conv(f"{name}.conv", image, width, kernel=7 if imagenet else 3, stride=2 if imagenet else 1)
    layers.batch_norm(f"{name}.bn", width)
    return (width, -(-x[1] // 2), -(-x[2] // 2)) if imagenet else x  # its max-pool


def _block(layers: _Layers, name: str, arch: Architecture, x: _Shape, *, stage: int, stride: int) -> _Shape:
    """List the residual branch of a block, without its shortcut."""
    width, n_out = arch.widths[stage], arch.channels[stage]
    if arch.block == "basic":
        convolutions: tuple[tuple[int, int, int, int], ...] = ((width, 3, stride, 1), (n_out, 3, 1, 1))
    else:
        convolutions = ((width, 1, 1, 1), (width, 3, stride, arch.groups), (n_out, 1, 1, 1))
    for number, (n_out, kernel, step, groups) in enumerate(convolutions, start=1):
        x = layers.conv(f"{name}.conv{number}", x, n_out, kernel=kernel, stride=step, groups=groups)
        layers.batch_norm(f"{name}.bn{number}", n_out)
    return x


def _shortcut(layers: _Layers, name: str, kind: ShortcutKind, x: _Shape, y: _Shape, *, stride: int) -> bool:
    """List what carries `x` past a block; return whether it is more than the identity."""
    if x == y and stride == 1:
        return False
    if kind == "projection":
        layers.conv(f"{name}.conv", x, y[0], kernel=1, stride=stride)
        layers.batch_norm(f"{name}.bn", y[0])
    elif kind == "average-pool" and (x[1] % stride or x[2] % stride):
        raise UsageError(
            f"{name}: an average-pool shortcut halves {x[1]} x {x[2]} pixels, which are odd: its result would not fit "
            "the block's. Images, scaled down where the network does so first, must have a size that can be halved at "
            "every stage change, for instance 32 x 32"
        )
    return True


def _stages_and_strides(arch: Architecture) -> Iterator[tuple[int, int]]:
    """Yield each block's stage, from 0, and its stride."""
    for stage, n_blocks in enumerate(arch.stages):
        for i in range(n_blocks):
            yield stage, 2 if i == 0 and stage > 0 else 1

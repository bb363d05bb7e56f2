"""What a network is, as plain data: the list of parts that export, engines and runtime all walk.

Nothing here knows PyTorch, ONNX or ResNets. Adding another architecture means producing a `NetworkSpec` and one module
for each of its parts (for ResNets `bdtool.models.layout` and `bdtool.models.parts` do it), nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # numpy only types the signatures: `bdtool --help` and a cached build need not load it
    import numpy as np

Interpolation = Literal["bilinear", "bicubic"]
PartKind = Literal["policy", "stem", "block", "shortcut", "head", "full"]
BATCH_AXIS = "N"
PIXELS = "uint8"  # dtype of images whose engines normalise them
IMAGE = "image"  # the activation that the first parts read
DEFAULT_THRESHOLD = 0.5
_BULK_IMAGES, _BULK_BYTES = 64, 16 << 20  # of a ResNet-50 5 images, whose largest activation takes 3 MB each


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a part.

    `shape` holds ints for static axes and strings for dynamic ones: ("N", 16, 32, 32).
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"

    def shape_for(self, n_images: int) -> tuple[int, ...]:
        """Return the static shape for a batch of `n_images`."""
        return tuple(n_images if isinstance(axis, str) else axis for axis in self.shape)


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """One part of a network: what it reads and writes, its tensors and what it costs.

    `reads` and `writes` name activations of the running network ("image", "x", "keep_probability", "logits"), in the
    order of `inputs` and `outputs`. Whatever a block writes besides "x" is handed to the controller.
    `flops` is 2 x multiply-accumulates of convolutions and linear layers for one image (the paper's rule).
    """

    name: str
    kind: PartKind
    index: int | None = None  # block number k, for blocks and shortcuts
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    flops: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(PartKind):
            raise ValueError(f"part {self.name!r}: kind {self.kind!r} is not one of {', '.join(get_args(PartKind))}")
        if len(self.reads) != len(self.inputs) or len(self.writes) != len(self.outputs):
            raise ValueError(f"part {self.name!r}: reads/inputs and writes/outputs must have the same length")

    @property
    def emits(self) -> tuple[str, ...]:
        """Names of the outputs that go to the controller: all but the activation `x`."""
        return tuple(t.name for activation, t in zip(self.writes, self.outputs, strict=True) if activation != "x")

    def with_activation(self, dtype: str) -> PartSpec:
        """Return the same part with `x`, the activation between parts, in another dtype."""

        def typed(activations: tuple[str, ...], tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            pairs = zip(activations, tensors, strict=True)
            return tuple(replace(tensor, dtype=dtype) if name == "x" else tensor for name, tensor in pairs)

        return replace(self, inputs=typed(self.reads, self.inputs), outputs=typed(self.writes, self.outputs))

    @property
    def reads_image(self) -> bool:
        return IMAGE in self.reads

    def with_pixels(self) -> PartSpec:
        """Return the same part with images as uint8 [N, height, width, 3] instead of preprocessed ones."""

        def pixels(tensor: TensorSpec) -> TensorSpec:
            batch, channels, height, width = tensor.shape
            return replace(tensor, shape=(batch, height, width, channels), dtype=PIXELS)

        pairs = zip(self.reads, self.inputs, strict=True)
        return replace(self, inputs=tuple(pixels(tensor) if name == IMAGE else tensor for name, tensor in pairs))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the network's input: (pixel / 255 - mean) / std, channels RGB.

    `resize` is the length in pixels that the shorter side is scaled to, by `interpolation`, before the centre crop to
    height x width; None means that images must already have that size.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | None = None
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.interpolation not in get_args(Interpolation):
            known = ", ".join(get_args(Interpolation))
            raise ValueError(f"unknown interpolation {self.interpolation!r}; expected {known}")
        values = (*self.mean, *self.std)
        if len(values) != 6 or len(self.std) != 3 or not all(map(math.isfinite, values)) or min(self.std) <= 0:
            raise ValueError(f"mean and std need three values each, std above 0; got mean={self.mean}, std={self.std}")
        sizes = (self.height, self.width, *(() if self.resize is None else (self.resize,)))
        if not all(type(size) is int and size > 0 for size in sizes):  # True is an int, too
            raise ValueError(f"height, width and resize are numbers of pixels, above 0; got {sizes}")

    @property
    def scale(self) -> tuple[float, float, float]:
        """With `offset`, the same as one multiplication and one addition: pixel * scale + offset."""
        red, green, blue = (1 / (255 * std) for std in self.std)
        return red, green, blue

    @property
    def offset(self) -> tuple[float, float, float]:
        red, green, blue = (-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        return red, green, blue


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """A whole network: its parts in running order, and what a user must know to feed it and to read its answer.

    `mask` is for a base that was trained for one mask: its keep bits, block 0 first ("1" for kept). None: every block,
    or what the policy network keeps.
    """

    arch: str
    n_classes: int
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing
    stages: tuple[int, ...]  # blocks per stage
    threshold: float = DEFAULT_THRESHOLD  # keep a block when the policy's probability is at least this
    parts: tuple[PartSpec, ...]
    mask: str | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != self.n_classes:
            raise ValueError(f"{len(self.labels)} labels for {self.n_classes} classes")
        indices = [part.index for part in self.blocks]
        if len(indices) != self.n_blocks or indices != list(range(len(indices))):
            raise ValueError(f"blocks must be numbered 0 to {self.n_blocks - 1} in order; got {indices}")
        require_mask(self.mask, n_blocks=self.n_blocks, has_policy=self.has_policy)

    @property
    def blocks(self) -> tuple[PartSpec, ...]:
        return tuple(part for part in self.parts if part.kind == "block")

    @property
    def n_blocks(self) -> int:
        return sum(self.stages)

    @property
    def has_policy(self) -> bool:
        return any(part.kind == "policy" for part in self.parts)

    @property
    def default_policy(self) -> str:
        """The POLICY that holds where nobody gives one: what the network was trained for."""
        return "learned" if self.has_policy else self.mask or "all"

    def default_keep(self) -> np.ndarray | None:
        """Return the keep bits of every image by the default policy, bool [K]; None where a policy network decides."""
        return None if self.has_policy else keep_of(self.mask or "1" * self.n_blocks)

    def part(self, name: str) -> PartSpec:
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(f"no part {name!r}; parts: {', '.join(part.name for part in self.parts)}")

    def find(self, kind: PartKind, index: int | None = None) -> PartSpec | None:
        """Return the part of that kind (and block number), or None where the network has none."""
        return next((part for part in self.parts if part.kind == kind and part.index == index), None)

    def require(self, kind: PartKind) -> PartSpec:
        part = self.find(kind)
        if part is None:
            raise KeyError(f"the network has no {kind} part; parts: {', '.join(part.name for part in self.parts)}")
        return part

    def shortcut(self, k: int) -> PartSpec | None:
        """Return the part that runs when block `k` is dropped, or None where dropping it changes nothing."""
        return self.find("shortcut", k)

    def whole(self, name: str, *, flops: int) -> PartSpec:
        """Return a part that does from images to logits what a series of this network's parts does."""
        stem, head = self.require("stem"), self.require("head")
        return PartSpec(
            name=name,
            kind="full",
            reads=stem.reads,
            writes=head.writes,
            inputs=stem.inputs,
            outputs=head.outputs,
            flops=flops,
        )

    def with_full(self) -> NetworkSpec:
        """Return the same network with `full` as its last part: the static ResNet, every block kept."""
        return replace(self, parts=(*self.parts, self.whole("full", flops=self.full_flops)))

    def with_activation(self, dtype: str) -> NetworkSpec:
        """Return the same network with `x`, the activation between its parts, in another dtype."""
        return replace(self, parts=tuple(part.with_activation(dtype) for part in self.parts))

    def with_threshold(self, threshold: float | None) -> NetworkSpec:
        """Return the same network with another threshold of its policy network, 0 to 1; None leaves it."""
        return self if threshold is None else replace(self, threshold=threshold)

    def with_pixels(self) -> NetworkSpec:
        """Return the same network with images as uint8 [N, height, width, 3] instead of preprocessed ones."""
        return replace(self, parts=tuple(part.with_pixels() for part in self.parts))

    @property
    def takes_pixels(self) -> bool:
        """Whether images go in as pixels, uint8 [N, height, width, 3]; else float32 [N, 3, height, width]."""
        return self.require("stem").inputs[0].dtype == PIXELS

    def label(self, class_index: int) -> str:
        return self.labels[class_index] if self.labels is not None else str(class_index)

    @property
    def full_flops(self) -> int:
        """FLOPs of one image with every block kept and no policy network: the static ResNet."""
        return sum(part.flops for part in self.parts if part.kind in ("stem", "block", "head"))

    def images_within(self, n_bytes: int, *, at_most: int) -> int:
        """Return how many images at once keep the largest activation between parts, in float32, within `n_bytes`."""
        largest = max(math.prod(t.shape_for(1)) for part in self.parts for t in (*part.inputs, *part.outputs))
        return max(1, min(at_most, n_bytes // (4 * largest)))

    @property
    def bulk_batch(self) -> int:
        """Images to run at once where only the answers count: more take memory, and no less time."""
        return self.images_within(_BULK_BYTES, at_most=_BULK_IMAGES)

    def flops_per_image(self, keep: np.ndarray, *, with_policy: bool) -> np.ndarray:
        """Return the FLOPs of each image, float64 [N], for a keep matrix bool [N, K].

        A dropped block costs its shortcut, where it has one. `with_policy` adds the policy network, as the paper's
        dynamic figures do.
        """
        import numpy as np

        kept_cost = np.array([part.flops for part in self.blocks], dtype=np.float64)
        shortcuts = [self.shortcut(k) for k in range(self.n_blocks)]
        dropped_cost = np.array([s.flops if s else 0 for s in shortcuts], dtype=np.float64)
        fixed = self.require("stem").flops + self.require("head").flops
        if with_policy:
            fixed += self.require("policy").flops
        keep = np.asarray(keep, dtype=bool)
        return fixed + keep @ kept_cost + ~keep @ dropped_cost


def keep_of(bits: str) -> np.ndarray:
    """Return keep bits as bool [K]: "1" for kept, block 0 first."""
    import numpy as np

    return np.array([bit == "1" for bit in bits], dtype=bool)


def require_mask(mask: object, *, n_blocks: int, has_policy: bool) -> None:
    """Refuse what is not the mask of a network; None always is.

    Raises:
        ValueError: it is not one bit for each block, or there is a policy network, which decides.
    """
    if mask is None:
        return
    if not isinstance(mask, str) or len(mask) != n_blocks or set(mask) - {"0", "1"}:
        raise ValueError(f"mask {mask!r}: expected a string of {n_blocks} bits, 0 or 1 for each block")
    if has_policy:
        raise ValueError(f"mask {mask!r}: got a policy network, too, and only one of them can decide")


def dict_from_preprocessing(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return it as JSON values, without an `interpolation` that older versions of bdtool, which know one, take."""
    data = asdict(preprocessing)
    if preprocessing.interpolation == "bilinear":
        del data["interpolation"]
    return data


def preprocessing_from_dict(data: Mapping[str, Any]) -> Preprocessing:
    """Rebuild a `Preprocessing` from what `dict_from_preprocessing` gave (after JSON, tuples are lists).

    Raises:
        ValueError, TypeError, KeyError: a field is missing, unknown or impossible.
    """
    return Preprocessing(**{**data, "mean": _floats(data["mean"]), "std": _floats(data["std"])})


def _floats(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue

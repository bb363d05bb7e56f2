"""Whether the parts of a network fit together: what one reads is what an earlier one writes."""

from __future__ import annotations

from collections.abc import Mapping

from bdtool.errors import BundleError
from bdtool.specs import BATCH_AXIS, IMAGE, NetworkSpec, PartSpec, TensorSpec

_Shape = tuple[int | str, ...]


def check_wiring(network: NetworkSpec) -> None:
    """Compare the shape of every activation, from the image to the logits, where it is written and where it is read.

    Raises:
        BundleError: a part reads what nothing before it writes, or in another shape; the shapes are not those of the
            images, the blocks or the classes; or a block or shortcut writes no activation for the next part.
    """
    size = network.preprocessing
    shapes: dict[str, _Shape] = {IMAGE: (BATCH_AXIS, 3, size.height, size.width)}
    expected: dict[str, _Shape] = {
        "logits": (BATCH_AXIS, network.n_classes),
        "keep_probability": (BATCH_AXIS, network.n_blocks),
    }
    before_block = shapes
    for part in network.parts:
        if part.kind == "block":
            before_block = dict(shapes)
        if part.kind in ("block", "shortcut") and "x" not in part.writes:
            raise _misfit(part, "no x", "to be written for the next part")
        source = before_block if part.kind == "shortcut" else shapes  # a shortcut reads what its block read
        for activation, tensor in zip(part.reads, part.inputs, strict=True):
            _check(part, activation, tensor, source)
        for activation, tensor in zip(part.writes, part.outputs, strict=True):
            # a shortcut gives what its block gave, and `full` what the head did
            given = shapes if part.kind in ("shortcut", "full") else {activation: tensor.shape}
            _check(part, activation, tensor, {**given, **expected})
            shapes[activation] = tensor.shape


def _check(part: PartSpec, activation: str, tensor: TensorSpec, shapes: Mapping[str, _Shape]) -> None:
    if activation not in shapes:
        raise _misfit(part, activation, "to be written by an earlier part")
    if tensor.shape != shapes[activation]:
        raise _misfit(part, f"{activation} of shape {list(tensor.shape)}", f"{list(shapes[activation])}")


def _misfit(part: PartSpec, got: str, expected: str) -> BundleError:
    return BundleError(f"part {part.name!r}: got {got}, expected {expected}; export the model again")

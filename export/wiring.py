"""Whether the parts of a network fit together: what one reads is what an earlier one writes."""

from __future__ import annotations

from collections.abc import Mapping

from bdtool.errors import BundleError
from bdtool.specs import BATCH_AXIS, IMAGE, NetworkSpec, PartSpec, TensorSpec

_Form = tuple[tuple[int | str, ...], str]  # shape and dtype


def check_wiring(network: NetworkSpec) -> None:
    """Compare shape and dtype of every activation, from image to logits, where it is written and where it is read.

    Raises:
        BundleError: a part reads what nothing before it writes, or in another form; the forms are not those of the
            images, the blocks or the classes; or a block or shortcut writes no activation for the next part.
    """
    size = network.preprocessing
    forms: dict[str, _Form] = {IMAGE: ((BATCH_AXIS, 3, size.height, size.width), "float32")}
    expected: dict[str, _Form] = {
        "logits": ((BATCH_AXIS, network.n_classes), "float32"),
        "keep_probability": ((BATCH_AXIS, network.n_blocks), "float32"),
    }
    before_block = forms
    for part in network.parts:
        if part.kind == "block":
            before_block = dict(forms)
        if part.kind in ("block", "shortcut") and "x" not in part.writes:
            raise _misfit(part, "no x", "to be written for the next part")
        source = before_block if part.kind == "shortcut" else forms  # a shortcut reads what its block read
        for activation, tensor in zip(part.reads, part.inputs, strict=True):
            _check(part, activation, tensor, source)
        for activation, tensor in zip(part.writes, part.outputs, strict=True):
            # a shortcut gives what its block gave, and `full` what the head did
            given = forms if part.kind in ("shortcut", "full") else {activation: (tensor.shape, tensor.dtype)}
            _check(part, activation, tensor, {**given, **expected})
            forms[activation] = (tensor.shape, tensor.dtype)


def _check(part: PartSpec, activation: str, tensor: TensorSpec, forms: Mapping[str, _Form]) -> None:
    if activation not in forms:
        raise _misfit(part, activation, "to be written by an earlier part")
    shape, dtype = forms[activation]
    if tensor.shape != shape:
        raise _misfit(part, f"{activation} of shape {list(tensor.shape)}", f"{list(shape)}")
    if tensor.dtype != dtype:
        raise _misfit(part, f"{activation} of {tensor.dtype}", dtype)


def _misfit(part: PartSpec, got: str, expected: str) -> BundleError:
    return BundleError(f"part {part.name!r}: got {got}, expected {expected}; export the model again")

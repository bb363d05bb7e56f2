"""What the `config.json` and `preprocessor_config.json` of transformers' ResNets say."""

from __future__ import annotations

import re
from typing import Any

from bdtool.models.checkpoint_formats import GivenInput
from bdtool.models.hub_settings import HubSettings
from bdtool.specs import Interpolation

# What tensors do not show, and all networks of ours have.
_FACTS = {
    "model_type": "resnet",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
_NO_LABEL = re.compile(r"LABEL_\d+")  # of classes that nobody named
_CONVNEXT = "ConvNext"  # whose image processor ResNets use: it crops in a way of its own
_CONVNEXT_CROP = 224 / 256  # its `crop_pct` where the file has none
_CONVNEXT_CROPS_BELOW = 384  # pixels; larger inputs are squeezed
_RESAMPLING: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


def require_network(config: HubSettings) -> None:
    """Refuse what differs from our networks without a trace in the tensors.

    Raises:
        CheckpointError: it does.
    """
    for key, expected in _FACTS.items():
        config.require(key, expected)


def labels(config: HubSettings) -> tuple[str, ...] | None:
    """Return the names of the classes, where somebody named them.

    Raises:
        CheckpointError: there is not one for each class.
    """
    by_number = config.inner("id2label").values
    if all(_NO_LABEL.fullmatch(str(label)) for label in by_number.values()):  # or there are none
        return None
    numbers = [str(n) for n in range(len(by_number))]
    if by_number.keys() != set(numbers):
        raise config.problem(f"id2label has the keys {', '.join(by_number)}, expected 0 to {len(numbers) - 1}")
    return tuple(str(by_number[number]) for number in numbers)


def network_input(processor: HubSettings, *, given: GivenInput) -> GivenInput:
    """Return how an image processor makes the input of pictures.

    Raises:
        CheckpointError: bdtool does not have that, and what is `given` does not replace it.
    """
    for key, expected in (("do_rescale", True), ("rescale_factor", 1 / 255), ("rescale_offset", False)):
        processor.require(key, expected)
    is_normalized = processor.values.get("do_normalize", True)
    side, resize = _sizes(processor, given) if processor.values.get("do_resize", True) else (None, None)
    return GivenInput(
        mean=processor.colour("image_mean") if is_normalized else (0.0, 0.0, 0.0),
        std=processor.colour("image_std") if is_normalized else (1.0, 1.0, 1.0),
        size=side,
        resize=resize,
        interpolation=processor.interpolation("resample", _RESAMPLING, given),
    )


def _sizes(processor: HubSettings, given: GivenInput) -> tuple[int | None, int | None]:
    """Return the side of the input, and what the shorter side of a picture is scaled to before its middle is taken."""
    size = processor.values.get("size")
    if size is None:
        return None, None
    edge = _pixels(size.get("shortest_edge") if isinstance(size, dict) else size)
    is_convnext = "crop_pct" in processor.values or _type(processor).startswith(_CONVNEXT)
    if is_convnext and edge is not None and edge < _CONVNEXT_CROPS_BELOW:
        return edge, int(edge / processor.share("crop_pct", _CONVNEXT_CROP))
    crop = _square(processor.values.get("crop_size")) if processor.values.get("do_center_crop") else None
    if crop is not None and edge is not None and isinstance(size, dict):
        return crop, edge
    side = crop or edge or _square(size)
    return side, processor.resize_asked_for("size", side, given)


def _type(processor: HubSettings) -> str:
    """Return the name of the image processor's class, which was called a feature extractor once."""
    values = processor.values
    return str(values.get("image_processor_type", values.get("feature_extractor_type", "")))


def _square(size: Any) -> int | None:
    if not isinstance(size, dict):
        return _pixels(size)
    return _pixels(size.get("height")) if size.get("height") == size.get("width") else None


def _pixels(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None

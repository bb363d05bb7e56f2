"""Random crops and flips for a whole batch at once. All randomness comes in as uniform numbers, one row an image, so
that a step can be repeated exactly, on one device or on several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bdtool.data.images import RESAMPLING
from bdtool.specs import Interpolation

N_CROP_FLIP = 3  # uniform numbers that `crop_and_flip` takes for each image
N_RESIZED_CROP = 5  # and `random_resized_crop`


def crop_and_flip(images: Tensor, uniforms: Tensor, *, padding: int = 4) -> Tensor:
    """Return each image shifted by up to `padding` pixels, black moving in, and flipped half of the time.

    Source: He et al., CVPR 2016, section 4.2.

    Args:
        images: uint8 [N, H, W, 3].
        uniforms: float [N, 3] in [0, 1): vertical shift, horizontal shift, flip.
    """
    n, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    shift = (uniforms[:, :2] * (2 * padding + 1)).long()
    rows = shift[:, :1] + torch.arange(height, device=images.device)
    columns = shift[:, 1:] + torch.arange(width, device=images.device)
    columns = torch.where(uniforms[:, 2:] < 0.5, columns, columns.flip(1))
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]]


def flip(images: Tensor, uniforms: Tensor) -> Tensor:
    """Return images, uint8 [N, H, W, 3], flipped half of the time, by the last number of `uniforms`, float [N, 3]."""
    return torch.where(uniforms[:, -1, None, None, None] < 0.5, images, images.flip(2))


def random_resized_crop(
    pixels: np.ndarray, uniforms: Sequence[float], *, height: int, width: int, how: Interpolation = "bilinear"
) -> np.ndarray:
    """Return a random part of a picture, scaled to uint8 [height, width, 3] and flipped half of the time.

    The part has 8 % to 100 % of the area and an aspect ratio of 3/4 to 4/3. Source: Szegedy et al., "Going Deeper with
    Convolutions", CVPR 2015, section 6, as in torchvision's `RandomResizedCrop`; a part that does not fit is cut to the
    picture instead of drawn again.

    Args:
        pixels: uint8 [H, W, 3].
        uniforms: five numbers in [0, 1): area, aspect ratio, vertical place, horizontal place, flip.
    """
    full_height, full_width = pixels.shape[:2]
    area = full_height * full_width * (0.08 + 0.92 * uniforms[0])
    ratio = math.exp((2 * uniforms[1] - 1) * math.log(4 / 3))
    part_width = min(full_width, max(1, round(math.sqrt(area * ratio))))
    part_height = min(full_height, max(1, round(math.sqrt(area / ratio))))
    top = int(uniforms[2] * (full_height - part_height + 1))
    left = int(uniforms[3] * (full_width - part_width + 1))
    box = (left, top, left + part_width, top + part_height)
    part = np.asarray(Image.fromarray(pixels).resize((width, height), RESAMPLING[how], box=box))
    return part if uniforms[4] < 0.5 else part[:, ::-1]

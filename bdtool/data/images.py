"""One picture at a time: an image file becomes RGB pixels, and pixels get the network's input size."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from bdtool.errors import DataError
from bdtool.specs import Interpolation, Preprocessing

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
RESAMPLING: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Named, so that Pillow never hands a file to the decoders that start other programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# CMYK and YCbCr as torchvision converts them: ImageNet's training images have some, and networks are trained on that
_OPAQUE_MODES = frozenset({"1", "L", "RGB", "CMYK", "YCbCr"})
_ALPHA_MODES = frozenset({"P", "PA", "LA", "La", "RGBA", "RGBa"})  # a palette may hold transparent colours
_MAX_RESIZED_PIXELS = 100_000_000
_UPRIGHT = {  # what turns a picture upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: Path) -> np.ndarray:
    """Return the picture in a file as uint8 [H, W, 3], RGB, turned upright by its EXIF orientation.

    Grey, bilevel, CMYK and palette pictures become RGB, as do pictures whose alpha channel is opaque everywhere. Of an
    animation the first frame is read; 16-bit RGB files keep the upper 8 bits, as Pillow reads them. Where the EXIF
    itself is damaged the picture stays as it lies.

    Raises:
        DataError: the file is missing, damaged, too large, no picture, or in a mode that has no safe way to RGB.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check_size(*image.size)  # Pillow only warns of twice as many, and warnings belong to all threads
            image.load()
            upright = _turned_upright(image)
    except FileNotFoundError as exc:
        raise DataError(f"{path}: no such file. Check the path") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise DataError(f"{path}: refused as a decompression bomb ({exc}). Scale the picture down first") from exc
    except UnidentifiedImageError as exc:
        raise DataError(f"{path}: not a picture in a known format. Expected one of {', '.join(_FORMATS)}") from exc
    except Exception as exc:  # on damaged files Pillow's decoders raise almost anything: OSError, SyntaxError, KeyError
        raise DataError(f"{path}: cannot be read ({type(exc).__name__}: {exc}). Replace or remove the file") from exc
    return np.array(_rgb_from_image(upright, path=path), dtype=np.uint8)


def _turned_upright(image: Image.Image) -> Image.Image:
    """Return the picture as it is meant to be seen.

    `ImageOps.exif_transpose` would write the rest of the EXIF anew, and refuses pictures where it cannot.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as exc:  # on damaged EXIF Pillow raises almost anything: SyntaxError, ValueError
        logger.info("%s: its EXIF cannot be read (%s)", getattr(image, "filename", "a picture"), exc)
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _check_size(width: int, height: int) -> None:
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(f"{width} x {height} pixels, at most {Image.MAX_IMAGE_PIXELS} are read")


def _rgb_from_image(image: Image.Image, *, path: Path) -> Image.Image:
    if image.mode not in _OPAQUE_MODES | _ALPHA_MODES:
        raise DataError(
            f"{path}: got mode {image.mode}, which has no safe conversion to 8-bit RGB. Save it as 8-bit RGB first"
        )
    if image.mode in _OPAQUE_MODES and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    lowest_alpha, _ = rgba.getchannel("A").getextrema()
    if lowest_alpha != 255:
        raise DataError(
            f"{path}: got mode {image.mode} with transparent pixels (alpha down to {lowest_alpha}), expected an opaque "
            "picture. Put it on a background and save it as RGB first"
        )
    return rgba.convert("RGB")


def fit_image(pixels: np.ndarray, preprocessing: Preprocessing, *, source: str, resize: bool = False) -> np.ndarray:
    """Return the picture at the network's input size, uint8 [height, width, 3].

    With `preprocessing.resize` the shorter side is scaled to that length and the centre cropped, which equals
    torchvision's `Resize` and `CenterCrop` on a PIL image. Without it the picture must already have the input size,
    unless `resize` asks to scale its shorter side to the input's longer one and to crop the centre.

    Args:
        pixels: uint8 [H, W, 3].
        source: what the error calls the picture, for instance its file name.

    Raises:
        DataError: the size does not fit and nobody asked to resize, or it would become too large.
    """
    height, width, how = preprocessing.height, preprocessing.width, preprocessing.interpolation
    if preprocessing.resize is not None:
        return _crop_centre(_scale_shorter_side(pixels, preprocessing.resize, how, source=source), height, width)
    if pixels.shape[:2] == (height, width):
        return pixels
    if resize:
        return _crop_centre(_scale_shorter_side(pixels, max(height, width), how, source=source), height, width)
    raise DataError(
        f"{source}: got {pixels.shape[1]} x {pixels.shape[0]} pixels, the model takes {width} x {height}. "
        "Pass --resize to scale the shorter side and crop the centre"
    )


def _scale_shorter_side(pixels: np.ndarray, length: int, how: Interpolation, *, source: str) -> np.ndarray:
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    if short == length:
        return pixels
    new_long = int(length * long / short)  # torchvision's rounding: transforms.functional.resize
    if length * new_long > _MAX_RESIZED_PIXELS:
        raise DataError(
            f"{source}: got {width} x {height} pixels; with its shorter side scaled to {length} it would have "
            f"{length * new_long}, at most {_MAX_RESIZED_PIXELS} are made. Crop it, or take a network of smaller input"
        )
    size = (length, new_long) if width <= height else (new_long, length)
    return np.asarray(Image.fromarray(pixels).resize(size, RESAMPLING[how]))


def _crop_centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop, or pad with black where the picture is smaller: torchvision's `center_crop`, roundings included."""
    missing = [max(0, want - have) for want, have in zip((height, width), pixels.shape, strict=False)]
    if any(missing):
        pixels = np.pad(pixels, [*((m // 2, (m + 1) // 2) for m in missing), (0, 0)])
    top = round((pixels.shape[0] - height) / 2)
    left = round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]

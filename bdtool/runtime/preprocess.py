"""Pixels become the network's input. On the latency path: at batch 1 every microsecond here is paid per image."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from bdtool.errors import DataError
from bdtool.specs import Preprocessing
from bdtool.words import counted

_SMALL_PLANE_PIXELS = 64 * 64


class Preprocessor:
    """Turns batches into network input, with scale and offset computed once; it keeps no state between calls.

    Equals torchvision's `ToTensor` and `Normalize` within 1e-6, by one multiplication and one addition:
    (pixel / 255 - mean) / std = pixel * scale + offset.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._nhwc_tail = (preprocessing.height, preprocessing.width, 3)
        self._nchw_tail = (3, preprocessing.height, preprocessing.width)
        # Factors spread over whole small planes take 3.5 us instead of 5.1 us for one 32 x 32 image, because numpy then
        # runs one loop without broadcasting; large planes lose more to the memory they read (94 us against 81 at 224).
        is_small = preprocessing.height * preprocessing.width <= _SMALL_PLANE_PIXELS
        shape = self._nchw_tail if is_small else (3, 1, 1)
        ends = np.array(preprocessing.offset), 255 * np.array(preprocessing.scale) + np.array(preprocessing.offset)
        self.largest = float(np.abs(ends).max())  # value of a preprocessed pixel, without its sign
        self._scale = _spread(np.array(preprocessing.scale), shape)
        self._offset = _spread(np.array(preprocessing.offset), shape)

    def __call__(self, images: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return float32 [N, 3, height, width], C-contiguous.

        Args:
            images: uint8 [N, height, width, 3]; or float32 [N, 3, height, width] already preprocessed, which is
                returned as it is, without a copy where it is contiguous.
            out: float32 [N, 3, height, width] to write to and to return; None makes a new array.

        Raises:
            DataError: no images, or another dtype, layout or size.
            ValueError: `out` does not fit.
        """
        is_pixels = self.are_pixels(images)
        if out is not None:
            self._check_out(out, n_images=len(images))
        return self._normalize(images, out) if is_pixels else _passed_through(images, out)

    def checked(self, images: np.ndarray) -> np.ndarray:
        """Return a batch as it is, C-contiguous: for engines that normalise, or where it is preprocessed.

        Raises:
            DataError: as for a call.
        """
        self.are_pixels(images)
        return np.ascontiguousarray(images)

    def check_on_device(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Raise DataError unless a batch on a GPU is what some engine there takes."""
        expected = (np.dtype(np.float32), self._nchw_tail), (np.dtype(np.uint8), self._nhwc_tail)
        if (dtype, shape[1:]) not in expected or shape[0] == 0:
            tails = [f"{kind} [N, {', '.join(map(str, tail))}]" for kind, tail in expected]
            raise DataError(
                f"images on the GPU: got {dtype} {list(shape)}, expected preprocessed {' or pixels '.join(tails)}. "
                "Bring them into one of these forms there, or pass a numpy array"
            )

    def are_pixels(self, images: np.ndarray) -> bool:
        """Return whether a batch is pixels, and not preprocessed; refuse one that is neither."""
        if not isinstance(images, np.ndarray):
            raise TypeError(f"images must be a numpy array; got {type(images).__name__}. Pass np.asarray(images)")
        is_pixels = images.dtype == np.uint8 and images.shape[1:] == self._nhwc_tail
        if not is_pixels and (images.dtype != np.float32 or images.shape[1:] != self._nchw_tail):
            raise DataError(self._refusal(images))
        if len(images) == 0:
            raise DataError(f"images: got shape {list(images.shape)}, expected at least one image. Pass one")
        return bool(is_pixels)

    def _normalize(self, images: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        if out is None:
            out = np.empty((len(images), *self._nchw_tail), dtype=np.float32)
        np.copyto(out, images.transpose(0, 3, 1, 2))
        np.multiply(out, self._scale, out=out)
        np.add(out, self._offset, out=out)
        return out

    def _check_out(self, out: np.ndarray, *, n_images: int) -> None:
        shape = (n_images, *self._nchw_tail)
        if out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous float32 {list(shape)}; got {out.dtype} {list(out.shape)}")

    def _refusal(self, images: np.ndarray) -> str:
        height, width, _ = self._nhwc_tail
        return (
            f"images: got {images.dtype} {list(images.shape)}, expected uint8 [N, {height}, {width}, 3] "
            f"or preprocessed float32 [N, 3, {height}, {width}]. {self._hint(images)}"
        )

    def _hint(self, images: np.ndarray) -> str:
        if images.shape in (self._nhwc_tail, self._nchw_tail):
            return "One image needs a batch axis: pass images[None]"
        if images.dtype == np.uint8 and images.shape[1:] == self._nchw_tail:
            return "These pixels are NCHW: pass images.transpose(0, 2, 3, 1)"
        if images.dtype == np.float32 and images.shape[1:] == self._nhwc_tail:
            return "This is NHWC: preprocessed images are NCHW; pass images.transpose(0, 3, 1, 2), or pixels as uint8"
        if images.shape[1:] in (self._nhwc_tail, self._nchw_tail):
            return "Convert pixels 0 to 255 with astype(np.uint8), preprocessed images with astype(np.float32)"
        if images.shape[1:-1] == self._nhwc_tail[:2]:
            return f"The size is right, with {counted(images.shape[-1], 'channel')}: expected red, green and blue"
        return "Scale and crop pixels with bdtool.data.images.fit_image first"


def preprocess(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Return the network's input for a batch; see `Preprocessor`, which a loop should construct once."""
    return _preprocessor(preprocessing)(images)


@functools.lru_cache(maxsize=16)
def _preprocessor(preprocessing: Preprocessing) -> Preprocessor:
    return Preprocessor(preprocessing)


def _spread(channel_values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(channel_values.astype(np.float32).reshape(3, 1, 1), shape).copy()


def _passed_through(images: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return np.ascontiguousarray(images)
    np.copyto(out, images)
    return out

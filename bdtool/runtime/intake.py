"""A caller's images, on the host or on a GPU, become what the engines read."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from bdtool.errors import DataError
from bdtool.runtime.preprocess import Preprocessor
from bdtool.specs import PIXELS, NetworkSpec
from engines.base import Backend
from engines.device_array import DeviceArrayBackend, Images, device_array

logger = logging.getLogger(__name__)
_FAR = 5  # times the largest value of a pixel: more than any augmentation gives
_DLPACK_HOST = (1, 3)  # kDLCPU, and kDLCUDAHost: page-locked, as `DataLoader(pin_memory=True)` gives


class Intake:
    """Checks batches and prepares them, for the engines of one network. Not for two threads at once."""

    def __init__(self, network: NetworkSpec) -> None:
        self._preprocess = Preprocessor(network.preprocessing)
        self._takes_pixels = network.takes_pixels  # once: it is asked for each image
        self._has_looked = False  # at values of preprocessed images
        self._input = np.empty((0, 3, network.preprocessing.height, network.preprocessing.width), dtype=np.float32)

    def checked(self, images: Any) -> np.ndarray:
        """Return a batch on the host, which can be prepared.

        Raises:
            TypeError: it is no array, or none on the host.
            DataError: it cannot be read, or has another shape or type.
        """
        found = images if isinstance(images, np.ndarray) else _from_host_dlpack(images)
        taken: np.ndarray = images if found is None else found
        self._preprocess.are_pixels(taken)
        return taken

    def prepare(self, images: np.ndarray, *, aside: bool = False) -> np.ndarray:
        """Return the network's input for a batch on the host; valid until the next call.

        It is float32 [N, 3, height, width]; pixels, uint8 [N, height, width, 3], stay what they are where the engines
        normalise them.

        Args:
            aside: leave what the call before returned as it is: it is in use.

        Raises:
            DataError: the images have another shape or type.
        """
        if self._takes_pixels:
            return self._warned_of(self._preprocess.checked(images))
        if aside or not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
            return self._warned_of(self._preprocess(images))
        # The same memory each time: new memory costs page faults, for one 32 x 32 image five times the arithmetic.
        if len(images) > len(self._input):
            self._input = np.empty((len(images), *self._input.shape[1:]), dtype=np.float32)
        return self._preprocess(images, out=self._input[: len(images)])

    def taken(self, images: Any, backend: Backend) -> Images:
        """Return a batch where it is, on the host or on the GPU of a backend, uncopied.

        Raises:
            TypeError: it is no array.
            DataError: the backend or its GPU cannot read it; or, of one on a GPU, it has another shape or type.
        """
        found = device_array(images)
        if found is None and (on_host := _from_host_dlpack(images)) is not None:
            return on_host
        if found is None:
            raise TypeError(
                f"images must be a numpy array, or one on a GPU; got {type(images).__name__}. Pass np.asarray(images)"
            )
        if not isinstance(backend, DeviceArrayBackend):
            raise DataError(
                "images: got a GPU array, this backend takes host arrays. Open the bundle with --backend torch or "
                "tensorrt on that GPU, or pass a numpy array"
            )
        self._preprocess.check_on_device(found.shape, found.dtype)
        backend.check_device_array(found)
        return found

    def _warned_of(self, taken: np.ndarray) -> np.ndarray:
        """Return a batch; of the first preprocessed one, warn where its values can only be pixels."""
        if not self._has_looked and taken.dtype != PIXELS:
            self._has_looked = True  # once: it takes as long as preprocessing
            if (largest := float(np.abs(taken).max())) > _FAR * self._preprocess.largest:
                logger.warning(
                    "images: float32 values up to %.0f are no preprocessed ones, which lie within %.1f of 0. Pass "
                    "pixels as uint8 [N, H, W, 3], or (pixels / 255 - mean) / std",
                    largest,
                    self._preprocess.largest,
                )
        return taken

    def needs_preprocessed_parts(self, taken: Images) -> bool:
        """Say whether images are preprocessed and the network's parts take pixels."""
        return self._takes_pixels and taken.dtype != PIXELS


def _from_host_dlpack(images: Any) -> np.ndarray | None:
    """Return an array of another library that is on the host (a CPU tensor of PyTorch), uncopied; None: it is none.

    Raises:
        DataError: a tensor that takes part in a gradient.
    """
    ask = getattr(images, "__dlpack_device__", None)
    try:
        if ask is None or ask()[0] not in _DLPACK_HOST:
            return None
    except BufferError:  # an array on some GPU, which does not know on which
        return None
    try:
        return np.from_dlpack(images)
    except (BufferError, RuntimeError, TypeError) as exc:
        raise DataError(
            f"images: the {type(images).__name__} cannot be read ({exc}). Pass a numpy array, uint8 or float32"
        ) from exc

"""A caller's images, on the host or on a GPU, become what the engines read."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdtool.errors import DataError
from bdtool.runtime.preprocess import Preprocessor
from bdtool.specs import PIXELS, NetworkSpec
from engines.base import Backend
from engines.device_array import DeviceArray, DeviceArrayBackend, Images, device_array


class Intake:
    """Checks batches and prepares them, for the engines of one network. Not for two threads at once."""

    def __init__(self, network: NetworkSpec) -> None:
        self._preprocess = Preprocessor(network.preprocessing)
        self._takes_pixels = network.takes_pixels  # once: it is asked for each image
        self._input = np.empty((0, 3, network.preprocessing.height, network.preprocessing.width), dtype=np.float32)

    def check(self, images: np.ndarray) -> None:
        """Raise TypeError or DataError unless a batch on the host can be prepared."""
        self._preprocess.are_pixels(images)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Return the network's input for a batch on the host; valid until the next call.

        It is float32 [N, 3, height, width]; pixels, uint8 [N, height, width, 3], stay what they are where the engines
        normalise them.

        Raises:
            DataError: the images have another shape or type.
        """
        if self._takes_pixels:
            return self._preprocess.checked(images)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
            return self._preprocess(images)
        # The same memory each time: new memory costs page faults, for one 32 x 32 image five times the arithmetic.
        if len(images) > len(self._input):
            self._input = np.empty((len(images), *self._input.shape[1:]), dtype=np.float32)
        return self._preprocess(images, out=self._input[: len(images)])

    def from_device(self, images: Any, backend: Backend) -> DeviceArray:
        """Return a batch that is on the GPU of a backend, uncopied.

        Raises:
            TypeError: it is no array on a GPU.
            DataError: the backend or its GPU cannot read it, or it has another shape or type.
        """
        found = device_array(images)
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

    def needs_preprocessed_parts(self, taken: Images) -> bool:
        """Say whether images are preprocessed and the network's parts take pixels."""
        return self._takes_pixels and taken.dtype != PIXELS

"""How keep bits turn into engine calls. A strategy is chosen once, when the orchestrator is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np

from bdtool.runtime.controllers import Controller
from bdtool.specs import PartSpec
from engines.base import Buffer, Call
from engines.device_array import DeviceArray, DeviceBufferLike, Images, Logits
from engines.graph_modes import GraphChoice

MAX_LANES = 8  # batch sizes whose buffers are kept; a choice that bounds memory
WrapCall = Callable[[PartSpec, Call], Call]  # lets a profiler time each engine call


class Outcome(NamedTuple):
    """What a strategy gives for a batch of N images."""

    logits: Logits  # float32 [N, classes], where the images are
    hits: np.ndarray | None = None  # bool [N], which ran as one specialised engine; None where there are none such


class Strategy(Protocol):
    """Runs batches of images, as the engines take them."""

    # How CUDA graphs are used; None where the strategy has none.
    graph: GraphChoice | None = None
    # Images on a device that one `run` takes; None: any number.
    max_device_images: int | None = None

    def run(self, images: Images, controller: Controller) -> Outcome: ...

    def close(self) -> None:
        """Stop what runs in the background."""


def fill(buffer: Buffer, images: Images) -> None:
    """Put images into a buffer, from the host or from the buffer's own device."""
    if isinstance(images, DeviceArray):
        cast(DeviceBufferLike, buffer).copy_from(images)  # the orchestrator has asked the backend
    else:
        buffer.write(images)


def take(buffer: Buffer, images: Images) -> Logits:
    """Return a copy of a buffer's content: on the host, or on the buffer's own device, if the images are there."""
    if isinstance(images, DeviceArray):
        return cast(DeviceBufferLike, buffer).copy_out()
    return buffer.read().copy()


def take_behind(buffer: Buffer, images: Images) -> Callable[[], Logits]:
    """Begin to take a buffer's content; what is returned gives it once another buffer was read, without a wait."""
    if isinstance(images, DeviceArray):
        return lambda: take(buffer, images)  # nobody waits for it
    return buffer.begin_read().copy


def joined(parts: Sequence[Logits]) -> Logits:
    """Return the logits of images that ran one at a time; those of a single one, on a device, stay where they are."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])

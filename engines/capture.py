"""Engine calls captured as CUDA graphs: what a backend offers for it, and their replay with one launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from engines.base import Buffer, Call, Engine
from engines.cuda_device import CudaDevice
from engines.graph_nodes import GraphNodes


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The captured work of one engine call.

    `keep_alive` holds whatever the work uses; `release` gives the graph back once it was copied into another.
    """

    graph: Any  # CUgraph
    keep_alive: object
    release: Callable[[], object] = lambda: None


class Capturer(Protocol):
    """How a backend's engine calls become parts of a CUDA graph."""

    @property
    def device(self) -> CudaDevice:
        """The device, whose stream is the one that the backend's buffers are written and read on."""

    def address(self, buffer: Buffer) -> int:
        """Return the device address of a buffer of this backend."""

    def capture(
        self, engine: Engine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, beside: bool
    ) -> Captured:
        """Capture one call from and into these buffers.

        Args:
            beside: it will run beside other captured work, so it must share no scratch memory with that.

        Raises:
            EngineError: it cannot be captured.
        """


@runtime_checkable
class CapturingBackend(Protocol):
    """A backend whose engines can be captured."""

    def capturer(self) -> Capturer: ...


def replayed_call(
    capturer: Capturer, engine: Engine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
) -> Call:
    """Return a call of one engine that replays its captured work: one launch, however many kernels it has.

    Raises:
        EngineError: the work cannot be captured.
    """
    captured = capturer.capture(engine, inputs, outputs, beside=False)
    device = capturer.device
    with device.current():
        executable = GraphNodes(device.cu, device.context).instantiate(captured.graph)
    captured.release()
    return launch_call(device, executable, keep_alive=(captured.keep_alive, inputs, outputs))


def launch_call(device: CudaDevice, executable: Any, *, keep_alive: object, graph: Any | None = None) -> Call:
    """Return a call that launches a CUgraphExec. With the call go the executable and, where given, its CUgraph.

    Args:
        keep_alive: whatever the graph uses, of which it has only the addresses.
    """

    def call() -> None:
        device.launch(executable)

    call.keep_alive = keep_alive  # type: ignore[attr-defined]
    device.on_collection(call, device.cu.cuGraphExecDestroy, executable)
    if graph is not None:
        device.on_collection(call, device.cu.cuGraphDestroy, graph)
    return call

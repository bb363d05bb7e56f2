"""What every backend offers: engines that are built from ONNX parts, loaded, bound to buffers and run.

A backend may keep the activations that pass between its engines in a layout of its own (ONNX Runtime's NCHW16c,
TensorRT's channels last). Images, keep probabilities and logits are always plain arrays, as the part's spec says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bdtool.errors import EngineError
from bdtool.specs import NetworkSpec, PartSpec, TensorSpec

if TYPE_CHECKING:  # only types: a build with nothing to do starts without numpy
    import numpy as np

Call = Callable[[], None]
DEFAULT_BACKEND, DEFAULT_DEVICE = "onnxruntime", "cpu"
PLAIN_LAYOUT = "NCHW"
ENGINE_TOLERANCE = 1e-4  # engine against ONNX part, over the output's range: other kernels, another summing order


@dataclass(frozen=True, kw_only=True)
class EngineBound:
    """How close an engine must come to its ONNX part: this share of the values within `tolerance` of the range."""

    tolerance: float
    share: float = 1.0


# An integer engine also quantizes the direct operand of the addition, where a value that no calibration image reached
# saturates, and rounds ties otherwise. A half-precision engine sums in another order, and may keep more digits inside
# than its part says: on the CPU up to 1e-3 was measured for single parts in fp16, 1.3e-3 for a whole ResNet-32. Whole
# networks that are deeper, on a GPU, were not measured.
ENGINE_BOUNDS = {
    "fp32": EngineBound(tolerance=ENGINE_TOLERANCE),
    "fp16": EngineBound(tolerance=0.01),
    "bf16": EngineBound(tolerance=0.05),
    "int8": EngineBound(tolerance=0.05, share=0.99),
    "int8 network": EngineBound(tolerance=0.25, share=0.99),  # the errors of all parts, on pictures of noise
}


class LayoutError(EngineError):
    """A part cannot be built with the activation layout asked for."""


@dataclass(frozen=True, kw_only=True)
class BackendIdentity:
    """What an engine file is made for; known without loading the backend's library."""

    name: str
    version: str
    target: str  # device and instruction set or GPU, as a file name: "cpu-x86_64-avx512"
    suffix: str  # of engine files
    settings: str | None = None  # of the build, as a text to compare; None: engines of any settings fit
    converts_fp16: bool = False  # fp16 engines can be built from a bundle's fp32 parts
    lists_targets: bool = False  # engines for several targets, as "sm86-sm89", serve each of them
    wider_targets: tuple[str, ...] = ()  # targets whose engines run here, too
    takes_pixels: bool = False  # engines read images as uint8 [N, height, width, 3] and normalise them on the device


class Buffer(Protocol):
    """Memory of a backend that holds one tensor of fixed shape; it belongs to the backend's device."""

    def write(self, values: np.ndarray) -> None:
        """Copy `values`, of the buffer's shape and dtype, into the buffer."""

    def read(self) -> np.ndarray:
        """Return the content on the host. It may be a view: valid until the next write or engine call."""

    def begin_read(self) -> np.ndarray:
        """Return an array that holds the content once the next `read` of a buffer of this backend is done.

        Where copies are only enqueued, several so have one wait. Valid as what `read` returns.
        """

    def first(self, n_rows: int) -> Buffer:
        """Return a buffer for `n_rows` rows (images), in this buffer's memory where the backend can."""

    def gather(self, source: Buffer, rows: np.ndarray) -> None:
        """Copy these rows of `source`, int [n_rows], into this buffer, which has as many."""

    def scatter(self, source: Buffer, rows: np.ndarray) -> None:
        """Copy `source`, which has as many rows as `rows`, into these rows of this buffer."""

    def copy_rows(self, source: Buffer, rows: np.ndarray) -> None:
        """Copy these rows of `source`, int [n], into the same rows of this buffer."""


class Engine(Protocol):
    """One part, loaded and ready to run."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def layout(self) -> str:
        """Layout of the activations named `x` in the part's reads and writes; see `engines.layouts`."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on host arrays in the engine's own layout; the caller owns the returned arrays.

        Raises:
            EngineError: the backend failed.
        """

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """Return a call that runs from and into these buffers, whose batch sizes are equal. Inputs are not changed.

        The call raises EngineError when the backend fails.
        """


class PartEngine:
    """What the engines of all backends share: the part that they compute says what goes in and comes out."""

    def __init__(self, part: PartSpec) -> None:
        self._part = part

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._part.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._part.outputs


def run_through_buffers(
    engine: Engine, feeds: Mapping[str, np.ndarray], allocate: Callable[[tuple[int, ...], str], Buffer]
) -> dict[str, np.ndarray]:
    """Run an engine on host arrays by buffers made for this one call; `allocate` makes one of a shape and dtype."""
    n_images = len(feeds[engine.inputs[0].name])
    inputs, outputs = (
        {tensor.name: allocate(tensor.shape_for(n_images), tensor.dtype) for tensor in tensors}
        for tensors in (engine.inputs, engine.outputs)
    )
    for name, buffer in inputs.items():
        buffer.write(feeds[name])
    engine.bind(inputs, outputs)()
    return {name: buffer.read() for name, buffer in outputs.items()}


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """What a build gives: the engine file's content and what was really obtained."""

    data: bytes
    layout: str
    error: float | None  # worst difference from the ONNX part, over the output's range; None where it cannot run here
    details: Mapping[str, Any] = field(default_factory=dict)  # what was obtained, ready for JSON
    layers: str | None = None  # the library's own account of the engine, JSON
    loadable: bool = True  # False: it has no weights, for a program that gives it some


@dataclass(frozen=True, kw_only=True)
class JoinedEngine:
    """An engine of several parts, and what joining it took: bytes that no engine before it held, at most."""

    engine: Engine
    own_bytes: int  # free again when the engine goes
    shared_bytes: int = 0  # of weights for this engine and later ones: held until the backend goes


class Backend(Protocol):
    """One inference library on one device."""

    @property
    def threads(self) -> int:
        """CPU threads of one engine call."""

    @property
    def plans_by_batch(self) -> bool:
        """Whether an engine plans its work anew each time that its batch size changes, which is then worth avoiding."""

    def activation_layout(self, network: NetworkSpec) -> str:
        """Return the layout that this backend prefers between the engines of `network`."""

    def build(self, part: PartSpec, model: bytes, *, layout: str) -> BuiltEngine:
        """Build one part from its ONNX model, with activations in `layout`.

        Raises:
            LayoutError: the part cannot be built with that layout; `PLAIN_LAYOUT` always can.
            EngineError: the backend refused the part, or the engine does not compute what the ONNX says.
        """

    def load(self, part: PartSpec, data: bytes, *, layout: str) -> Engine: ...

    def join(self, joined: PartSpec, pieces: Sequence[tuple[PartSpec, bytes]]) -> JoinedEngine:
        """Return an engine that runs these parts' engine files, all of one layout, in order.

        Engines that one backend object joins share the memory of their weights where the library allows it.
        """

    def fuse(self, network: NetworkSpec, pieces: Mapping[str, bytes]) -> bytes:
        """Return one engine file with an `If` for each block, of the engine files of the network's parts.

        Its inputs and outputs are those of `export.fused_spec.fused_spec`.

        Raises:
            UsageError, EngineError: the backend has no conditionals.
        """

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer: ...


@runtime_checkable
class HostCodeBackend(Protocol):
    """A backend some of whose engines bring machine code for the host along, which it does not run unless allowed."""

    def allow_host_code(self) -> None:
        """Let such engines be loaded from now on."""


@runtime_checkable
class ContextBackend(Protocol):
    """A backend whose calls need something around them.

    A context of its own in the calling thread, where a user may have another; or that calls on one stream wait for
    those on another.
    """

    def current(self) -> AbstractContextManager[None]:
        """Return a `with` for calls, one after the other; behind it the user's context is current again."""


def full_device_name(device: str) -> str:
    """Return "cuda:0" for "cuda", as backends and directories of engines name it, and any other name as it is."""
    return "cuda:0" if device == "cuda" else device


def context_of(backend: Backend) -> Callable[[], AbstractContextManager[None]]:
    """Return what gives the `with` that a backend's calls need; of most it does nothing."""
    return backend.current if isinstance(backend, ContextBackend) else nullcontext

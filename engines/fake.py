"""A backend for tests of whatever drives engines: cheap arithmetic whose result depends on order and on each part.

Every activation of an image is one number v, filled into the whole tensor. All values are small integers, exact in
float32, so that results can be compared with `==`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from bdtool.errors import EngineError
from bdtool.specs import NetworkSpec, PartSpec, TensorSpec
from engines.base import PLAIN_LAYOUT, Buffer, BuiltEngine, Call, Engine, JoinedEngine, PartEngine

_MODULUS = 97


def fake_value(kind: str, index: int, v: np.ndarray) -> np.ndarray:
    """Return what a part makes of the values v of its images, float [N]."""
    k = index + 1
    steps = {"stem": v * 2 + 1, "block": v * 3 + k, "shortcut": v * 5 + 2 * k, "head": v, "policy": v}
    return np.asarray(steps[kind] % _MODULUS)


class FakeBackend:
    """Builds from anything, needs nothing, and notes each engine call in `calls` as (part name, images).

    `broken` names parts whose build fails; `not_finite` names parts that return NaN.
    """

    threads = 1
    plans_by_batch = False

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.broken: set[str] = set()
        self.not_finite: set[str] = set()

    def activation_layout(self, network: NetworkSpec) -> str:
        return PLAIN_LAYOUT

    def build(self, part: PartSpec, model: bytes, *, layout: str) -> BuiltEngine:
        if part.name in self.broken:
            raise EngineError(f"part {part.name!r}: the fake backend was told to fail")
        return BuiltEngine(data=b"{}", layout=layout, error=0.0)

    def load(self, part: PartSpec, data: bytes, *, layout: str) -> Engine:
        return FakeEngine(part, self)

    def join(self, joined: PartSpec, pieces: Sequence[tuple[PartSpec, bytes]]) -> JoinedEngine:
        steps = [(part.kind, part.index or 0) for part, _ in pieces]
        return JoinedEngine(engine=FakeEngine(joined, self, steps=steps), own_bytes=len(json.dumps(steps)))

    def fuse(self, network: NetworkSpec, pieces: Mapping[str, bytes]) -> bytes:
        raise EngineError("the fake backend has no conditionals; use the onnxruntime backend for strategy 'fused'")

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return _FakeBuffer(np.zeros(shape, dtype))


class FakeEngine(PartEngine):
    """One part of the fake backend."""

    layout = PLAIN_LAYOUT

    def __init__(self, part: PartSpec, backend: FakeBackend, steps: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(part)
        self._backend = backend
        self._steps = steps  # of a joined engine: the kind and index of each part

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        first = feeds[self._part.inputs[0].name]
        n_images = first.shape[0]
        self._backend.calls.append((self._part.name, n_images))
        v = first.reshape(n_images, -1)[:, 0].round()
        return {tensor.name: self._output(tensor, v, n_images) for tensor in self._part.outputs}

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        def call() -> None:
            results = self.run({name: buffer.read() for name, buffer in inputs.items()})
            for name, buffer in outputs.items():
                buffer.write(results[name])

        return call

    def _output(self, tensor: TensorSpec, v: np.ndarray, n_images: int) -> np.ndarray:
        part, shape = self._part, tensor.shape_for(n_images)
        values = v if part.kind == "full" else fake_value(part.kind, part.index or 0, v)
        for kind, index in self._steps:
            values = fake_value(kind, index, values)
        columns = np.broadcast_to(values.reshape(n_images, *[1] * (len(shape) - 1)), shape).astype(np.float32)
        if part.kind == "policy":
            return ((columns + np.arange(shape[1])) % 3 / 2).astype(np.float32)  # 0, 0.5 or 1
        if part.name in self._backend.not_finite:
            return np.full(shape, np.nan, np.float32)
        return columns * max(1, part.outputs.index(tensor))  # the second of what a block emits is twice the first


class _FakeBuffer:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def write(self, values: np.ndarray) -> None:
        np.copyto(self._array, values)

    def read(self) -> np.ndarray:
        return self._array

    def begin_read(self) -> np.ndarray:
        return self.read()

    def first(self, n_rows: int) -> Buffer:
        return _FakeBuffer(self._array[:n_rows])

    def gather(self, source: Buffer, rows: np.ndarray) -> None:
        self._array[:] = source.read()[rows]

    def scatter(self, source: Buffer, rows: np.ndarray) -> None:
        self._array[rows] = source.read()

    def copy_rows(self, source: Buffer, rows: np.ndarray) -> None:
        self._array[rows] = source.read()[rows]

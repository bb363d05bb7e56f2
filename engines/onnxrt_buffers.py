"""ONNX Runtime's memory: numpy arrays on the host, and on a GPU what its Python API can allocate there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from engines.base import Buffer

OpenSession = Callable[[bytes], ort.InferenceSession]


class HostBuffer:
    """A numpy array that ONNX Runtime reads and writes in place."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.value = ort.OrtValue.ortvalue_from_numpy(array)  # shares the array's memory on the CPU

    def write(self, values: np.ndarray) -> None:
        np.copyto(self._array, values)

    def read(self) -> np.ndarray:
        return self._array

    def begin_read(self) -> np.ndarray:
        return self.read()

    def first(self, n_rows: int) -> Buffer:
        return HostBuffer(self._array[:n_rows])

    def gather(self, source: Buffer, rows: np.ndarray) -> None:
        np.take(source.read(), rows, axis=0, out=self._array, mode="clip")  # the default mode copies `out` first

    def scatter(self, source: Buffer, rows: np.ndarray) -> None:
        self._array[rows] = source.read()

    def copy_rows(self, source: Buffer, rows: np.ndarray) -> None:
        self._array[rows] = source.read()[rows]


class DeviceRows:
    """Moves rows between buffers of one GPU, by small models: the Python API has no call for it.

    Args:
        open_session: opens a model on that GPU.
    """

    def __init__(self, open_session: OpenSession) -> None:
        self._open = open_session
        self._sessions: dict[tuple[str, str], tuple[ort.InferenceSession, set[str]]] = {}  # with their inputs

    def run(self, name: str, source: ort.OrtValue, rows: np.ndarray, target: ort.OrtValue, dtype: str) -> None:
        """Move rows int [n] of tensors of `dtype` by the model `name`: "gather", "scatter" or "copy"."""
        session, inputs = self._session(name, dtype)
        numbers = np.ascontiguousarray(rows, dtype=np.int64)
        tensors, indices = {"source": source, "target": target}, {"rows": numbers, "places": numbers[:, None]}
        binding = session.io_binding()
        for tensor in inputs & tensors.keys():
            binding.bind_ortvalue_input(tensor, tensors[tensor])
        for tensor in inputs & indices.keys():
            binding.bind_cpu_input(tensor, indices[tensor])
        binding.bind_ortvalue_output("result", target)  # ScatterND leaves alone what is there already
        session.run_with_iobinding(binding)

    def _session(self, name: str, dtype: str) -> tuple[ort.InferenceSession, set[str]]:
        key = (name, dtype)
        if key not in self._sessions:
            session = self._open(_MODELS[name](helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))
            self._sessions[key] = session, {item.name for item in session.get_inputs()}
        return self._sessions[key]


def _gather(element_type: int) -> bytes:
    """Return the model result = source[rows]."""
    node = helper.make_node("Gather", ["source", "rows"], ["result"], axis=0)
    return _model([node], element_type, tensors=("source",), numbers=("rows",))


def _scatter(element_type: int) -> bytes:
    """Return the model result = target with source in the rows `places`, int [n, 1]."""
    node = helper.make_node("ScatterND", ["target", "places", "source"], ["result"])
    return _model([node], element_type, tensors=("target", "source"), numbers=("places",))


def _copy(element_type: int) -> bytes:
    """Return the model result = target with source[rows] in the rows `places`, int [n, 1], which are the same."""
    nodes = [
        helper.make_node("Gather", ["source", "rows"], ["moved"], axis=0),
        helper.make_node("ScatterND", ["target", "places", "moved"], ["result"]),
    ]
    return _model(nodes, element_type, tensors=("target", "source"), numbers=("rows", "places"))


_MODELS = {"gather": _gather, "scatter": _scatter, "copy": _copy}


def _model(
    nodes: list[onnx.NodeProto], element_type: int, *, tensors: tuple[str, ...], numbers: tuple[str, ...]
) -> bytes:
    def declared(name: str, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, None)  # of any shape

    inputs = [declared(name, element_type) for name in tensors]
    inputs += [declared(name, TensorProto.INT64) for name in numbers]
    graph = helper.make_graph(nodes, "rows", inputs, [declared("result", element_type)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


class OrtDeviceBuffer:
    """GPU memory owned by ONNX Runtime."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str, rows: DeviceRows) -> None:
        self._shape, self._dtype, self._device, self._rows = shape, dtype, device, rows
        kind, _, index = device.partition(":")
        self.value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype), kind, int(index))
        self._firsts: dict[int, OrtDeviceBuffer] = {}

    def write(self, values: np.ndarray) -> None:
        self.value.update_inplace(np.ascontiguousarray(values))

    def read(self) -> np.ndarray:
        array: np.ndarray = self.value.numpy()
        return array

    def begin_read(self) -> np.ndarray:
        return self.read()

    def first(self, n_rows: int) -> Buffer:
        # ONNX Runtime gives no part of its memory: one buffer for each number of rows, not for each part that asks
        if n_rows not in self._firsts:
            shape = (n_rows, *self._shape[1:])
            self._firsts[n_rows] = OrtDeviceBuffer(shape, self._dtype, self._device, self._rows)
        return self._firsts[n_rows]

    def gather(self, source: Buffer, rows: np.ndarray) -> None:
        self._move("gather", source, rows)

    def scatter(self, source: Buffer, rows: np.ndarray) -> None:
        self._move("scatter", source, rows)

    def copy_rows(self, source: Buffer, rows: np.ndarray) -> None:
        self._move("copy", source, rows)

    def _move(self, name: str, source: Buffer, rows: np.ndarray) -> None:
        self._rows.run(name, ort_value(source), rows, self.value, self._dtype)


def ort_value(buffer: Buffer) -> ort.OrtValue:
    """Return the memory of a buffer of this backend."""
    if not isinstance(buffer, HostBuffer | OrtDeviceBuffer):
        raise TypeError(f"expected a buffer of this backend, got {type(buffer).__name__}")
    return buffer.value

"""Weights of joined engines of ONNX Runtime: held once, in our memory, whichever paths run them.

A path is joined from the graphs of its parts without their weights, which its session is given beside the model. So
composing a path copies none of them (of a ResNet-50 with all its blocks 100 MiB), and its session keeps no copy: ONNX
Runtime makes one while it opens the session, and drops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, numpy_helper

from bdtool.specs import PartSpec
from export.compose import compose_parts
from export.ort_threads import shared_threads_options

_CACHE_LINE = 64  # bytes
# Memory of a joined engine's session, at most, over its graph. Measured: 53 with 17 of 54 blocks of a ResNet-110 where
# others come and go (`benchmarks/paths.py`), as dropped engines leave gaps.
_MEMORY_PER_GRAPH_BYTE = 72
_SMALL = 127  # bytes: tensors that stay in the graph, as shapes and axes must, which ONNX Runtime reads in it


@dataclass(frozen=True, kw_only=True)
class JoinedGraph:
    """A path as one optimised model, whose weights lie elsewhere."""

    model: bytes
    own_bytes: int  # that a session takes at most beside the weights that engines share
    added_bytes: int  # of weights that no path before had
    weights: Sequence[TensorProto]

    @property
    def is_packed(self) -> bool:
        return _are_packed(self.weights)


class SharedWeights:
    """The parts that were joined so far: graphs without weights, and the weights."""

    def __init__(self) -> None:
        self._graphs: dict[str, bytes] = {}  # by part
        self._values: dict[str, ort.OrtValue] = {}  # by name in a joined graph: "block_03/weight"

    def join(self, name: str, pieces: Sequence[tuple[PartSpec, bytes]]) -> JoinedGraph:
        """Return the graph of `pieces` in their order: engine files, which were checked when they were built."""
        added = sum(self._take(part.name, data) for part, data in pieces if part.name not in self._graphs)
        graphs = [(part, self._graphs[part.name]) for part, _ in pieces]
        model = compose_parts(name, graphs, check=False)
        weights = onnx.ModelProto.FromString(model).graph.initializer
        packed = sum(_array_bytes(weight) for weight in weights) if _are_packed(weights) else 0
        own = _MEMORY_PER_GRAPH_BYTE * len(model) + packed
        return JoinedGraph(model=model, own_bytes=own, added_bytes=added, weights=weights)

    def options(self, graph: JoinedGraph, n_threads: int) -> ort.SessionOptions:
        """Return options for a session of that graph; they hold the weights for as long as they live.

        It is not optimised again: some weights would be baked in.
        """
        options = shared_threads_options(n_threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not graph.is_packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        for weight in graph.weights:  # the session runs with these, as they are
            options.add_initializer(weight.name, self._values[weight.name])
        left_out = [weight.name for weight in graph.weights if weight.data_location == TensorProto.EXTERNAL]
        if left_out:  # and looks for no file
            options.add_external_initializers(left_out, [self._values[name] for name in left_out])
        return options

    def _take(self, part: str, data: bytes) -> int:
        """Hold a part's weights, and its graph without them; return the bytes of the weights."""
        model = onnx.ModelProto.FromString(data)
        n_bytes = 0
        for weight in model.graph.initializer:
            # the value shares the array's memory and keeps it alive, as the options and this object keep the value
            array = aligned(numpy_helper.to_array(weight))
            self._values[f"{part}/{weight.name}"] = ort.OrtValue.ortvalue_from_numpy(array)
            n_bytes += array.nbytes
            if array.nbytes > _SMALL:
                _leave_out(weight)
        self._graphs[part] = model.SerializeToString()
        return n_bytes


def aligned(values: np.ndarray) -> np.ndarray:
    """Return a copy that starts on a cache line, as AVX-512 kernels like their operands; numpy does not see to it."""
    memory = np.empty(values.nbytes + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    array = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


def _leave_out(weight: TensorProto) -> None:
    """Let a tensor say its type and shape alone; there is no such file, so that it cannot be read by mistake."""
    for field in ("raw_data", "float_data", "int32_data", "int64_data"):
        weight.ClearField(field)
    weight.data_location = TensorProto.EXTERNAL
    location = weight.external_data.add()
    location.key, location.value = "location", "weights"


def _are_packed(weights: Sequence[TensorProto]) -> bool:
    """Say whether each session packs its weights anew: integer convolutions need that to be fast.

    Of a float engine it would be the classifier alone: 8 MiB of an ImageNet network for each path, and no faster for
    one image.
    """
    return any(weight.data_type in (TensorProto.INT8, TensorProto.UINT8) for weight in weights)


def _array_bytes(weight: TensorProto) -> int:
    return int(np.prod(weight.dims)) * onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize

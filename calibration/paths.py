"""Activations along the paths that images really take: each block sees what its earlier blocks, kept or not, left.

The input of block k depends on which blocks before it ran. A range collected with every block kept can be far from
what the block meets under a policy, so the walk here drops what the policy drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from bdtool.specs import NetworkSpec, PartSpec
from calibration.quantize import direct_operands, watched_tensors
from calibration.ranges import RangeCollector
from calibration.walk import runs_part, walk_paths
from export.check import OnnxReference


@dataclass(frozen=True, kw_only=True)
class PathBatch:
    """Some images of a calibration set with their keep bits."""

    first: int  # number of the first image in the set
    images: np.ndarray  # float32 [N, 3, H, W], preprocessed
    keep: np.ndarray  # bool [N, K]


class WatchedPart:
    """An fp32 ONNX part whose watched tensors are outputs as well."""

    def __init__(self, model: bytes, part: PartSpec) -> None:
        self.part = part
        proto = onnx.ModelProto.FromString(model)
        self.watched = watched_tensors(proto)
        self.direct = direct_operands(proto)
        known = {info.name for info in (*proto.graph.input, *proto.graph.output)}
        for name in self.watched:
            if name not in known:
                proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        self._session = OnnxReference(proto.SerializeToString())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._session.run(feeds)


@dataclass(frozen=True, kw_only=True)
class TopUp:
    """Which images run a part for its statistics only, because too few run it under the policy."""

    rows: Mapping[str, frozenset[int]]  # by part name: numbers of images in the calibration set

    @classmethod
    def plan(cls, network: NetworkSpec, keep: np.ndarray, *, at_least: int) -> TopUp:
        """Choose the first images that do not run a part, until `at_least` images do; keep is bool [n_images, K]."""
        rows: dict[str, frozenset[int]] = {}
        for part in network.parts:
            if part.kind in ("block", "shortcut"):
                runs = runs_part(part, keep)
                missing = max(0, at_least - int(runs.sum()))
                rows[part.name] = frozenset(np.flatnonzero(~runs)[:missing].tolist())
        return cls(rows={name: found for name, found in rows.items() if found})

    def of(self, part: PartSpec, batch: PathBatch) -> np.ndarray:
        """Return the rows of the batch that top up a part, int [n]."""
        rows = np.array(sorted(self.rows.get(part.name, ())), dtype=np.int64) - batch.first
        return rows[(rows >= 0) & (rows < len(batch.images))]


class PathWalker:
    """Runs batches along their paths and counts what the parts' tensors hold.

    Keys of the collector are "part/tensor", and "stage s" for the activations `x` that pass between blocks: equal for
    all blocks of a stage, so that a dropped block can pass on what it got.
    """

    def __init__(self, network: NetworkSpec, parts: Mapping[str, WatchedPart], top_up: TopUp) -> None:
        self._network = network
        self._parts = parts
        self._top_up = top_up
        self._stages = stage_keys(network)

    def add(self, batch: PathBatch, collector: RangeCollector) -> None:
        """Run a batch and count."""

        def run(part: PartSpec, values: np.ndarray) -> np.ndarray:
            return self._run(part, values, collector)

        walk_paths(self._network, batch.images, batch.keep, run, extra=lambda part: self._top_up.of(part, batch))

    def _run(self, part: PartSpec, values: np.ndarray, collector: RangeCollector) -> np.ndarray:
        watched = self._parts[part.name]
        source, result = part.inputs[0].name, part.outputs[0].name
        outputs = watched.run({source: values})
        for name in watched.watched:
            collector.add(f"{part.name}/{name}", values if name == source else outputs[name])
        # Of images that are there for the statistics, too: one that comes later may keep the block, whose output would
        # saturate (ResNet-32, `first:5`: by 0.33 of its range, over the gate; with them 0.04).
        if part.writes == ("x",):
            collector.add(self._stages[part.name][1], outputs[result])
        return outputs[result]


def stage_keys(network: NetworkSpec) -> dict[str, tuple[str, str]]:
    """Return the keys of the activations that a part reads and writes, by part name.

    A stage ends where the shape changes.
    """
    shapes = [network.require("stem").outputs[0].shape]
    for block in network.blocks:
        if block.outputs[0].shape != shapes[-1]:
            shapes.append(block.outputs[0].shape)
    numbers = {shape: f"stage {i}" for i, shape in enumerate(shapes)}
    return {
        part.name: (numbers.get(part.inputs[0].shape, ""), numbers.get(part.outputs[0].shape, ""))
        for part in network.parts
    }


def part_ranges(
    network: NetworkSpec, part: WatchedPart, collector: RangeCollector, *, method: str, percentile: float
) -> dict[str, float]:
    """Return the range of each watched tensor of a part; `x` gets that of its stage."""
    spec = part.part
    read, written = stage_keys(network)[spec.name]
    keys = {name: f"{spec.name}/{name}" for name in part.watched}
    keys |= {t.name: read for a, t in zip(spec.reads, spec.inputs, strict=True) if a == "x"}
    keys |= {t.name: written for a, t in zip(spec.writes, spec.outputs, strict=True) if a == "x"}
    return {
        # nothing saturates at the direct operand of an addition in the part, so nothing shall in an engine
        name: collector.range_of(key, method="min-max" if name in part.direct else method, percentile=percentile)
        for name, key in keys.items()
    }

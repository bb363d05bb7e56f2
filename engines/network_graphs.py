"""A network's parts captured once, and the CUDA graphs made of them: those that decide, and those that know the mask.

`engines.cuda_graph` says how the graphs are built. Here is what goes into them: the buffers between which the
activation moves, and the work of each part in both directions. One image at a time, since each decides for itself.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from bdtool.errors import EngineError, UsageError
from bdtool.specs import NetworkSpec, PartSpec, TensorSpec
from engines.base import Backend, Buffer, Call, Engine
from engines.capture import Captured, CapturingBackend, launch_call
from engines.cuda_graph import (
    BLOCKS_PER_SWITCH,
    CapturedBlock,
    CapturedNetwork,
    DispatchMemory,
    GraphBuilder,
    Kernels,
    LookupMemory,
)
from engines.device_timer import fastest_ms
from engines.dispatch import Run, bits_from_words, mask_table, runs
from engines.dispatch_kernel import KERNEL_NAME, LOOKUP_NAME, SOURCE, cubin_from_source
from engines.speculation import NO_SPECULATION, Speculation, best_speculation
from export.fused_spec import fused_spec

_TIMED_RUNS = 10  # of each graph that is timed for a speculation: the fastest counts


def graph_spec(network: NetworkSpec) -> PartSpec:
    """Return the tensors of a graph that decides: the fused model's, but with 2 in `keep` where the policy gave NaN."""
    fused = fused_spec(network)
    logits, keep = fused.outputs
    return replace(fused, name="graph", outputs=(logits, replace(keep, dtype="uint8")))


class NetworkGraphs:
    """What every graph of a network shares: captured parts, and buffers for one image.

    `image` and `force` (0: the policy decides, 1: keep, 2: drop) go in; `probability`, `kept` (0, 1, or 2 where the
    policy gave NaN) and `logits` come out.

    Raises:
        UsageError: the backend's engines cannot be captured, or a block writes more than its activation.
        EngineError: a part cannot be captured.
    """

    def __init__(
        self,
        network: NetworkSpec,
        backend: Backend,
        engines: Mapping[str, Engine],
        *,
        blocks_per_switch: int = BLOCKS_PER_SWITCH,
    ) -> None:
        if not isinstance(backend, CapturingBackend):
            raise UsageError("strategy 'graph' needs engines that can be captured: --backend torch or tensorrt")
        if emitting := [part.name for part in network.blocks if part.emits]:
            raise UsageError(
                f"strategy 'graph' decides before block 0; {emitting[0]} has outputs for a controller. "
                "Use --strategy chain"
            )
        self._network = network
        self._backend: Backend = backend
        self._engines = engines
        self._capturer = backend.capturer()
        self._captured: list[Captured] = []
        self._releases: list[Callable[[], object]] = []
        weakref.finalize(self, _run_all, self._releases)
        self._pairs: dict[tuple[tuple[int, ...], str], tuple[Buffer, Buffer]] = {}
        device = self._capturer.device
        self._builder = GraphBuilder(device.cu, device.context, blocks_per_switch=blocks_per_switch)
        spec = graph_spec(network)
        self.image, self.force = (backend.allocate(tensor.shape_for(1), tensor.dtype) for tensor in spec.inputs)
        self.logits, self.kept = (backend.allocate(tensor.shape_for(1), tensor.dtype) for tensor in spec.outputs)
        self._allocate_decision()
        self._parts = self._capture_parts()

    def speculation(self, masks: Sequence[np.ndarray], shares: Sequence[float]) -> Speculation:
        """Return what had best run beside the policy network, by the device's own times; nothing without a policy.

        Args:
            masks: frequent keep masks, bool [K] each.
            shares: of the images that take each, 0 to 1.

        Raises:
            EngineError: the driver refuses a step.
        """
        if self._parts.policy is None:
            return NO_SPECULATION
        stem = self._parts.stem

        @cache  # the graphs, not their times: those without blocks are timed beside each of the others
        def alone(begun: tuple[Run, ...]) -> Call:
            return self._flat([stem, *self._graphs_of(begun)])

        @cache
        def beside(begun: tuple[Run, ...]) -> Call:
            return self._call(lambda: self._builder.begun_graph(self._parts, self._graphs_of(begun)))

        again_ms = self._ms(self._flat([stem, stem])) - self._ms(alone(()))
        return best_speculation(
            [tuple(self._runs(mask)[0]) for mask in masks],
            shares,
            beside_ms=lambda begun: self._ms(beside(begun)),
            alone_ms=lambda begun: self._ms(alone(begun)),
            again_ms=again_ms,
        )

    def deciding(self, masks: Sequence[np.ndarray] = (), speculation: Speculation = NO_SPECULATION) -> Call:
        """Return a call that runs `image` as one launch and reads nothing back: the policy decides, or `force`.

        Args:
            masks: frequent keep masks, bool [K] each: an image with one of them takes its flat path behind one SWITCH;
                the others, and all where there are none, take a SWITCH for every few blocks.
            speculation: what runs beside the policy network, where there are masks; paths that do not begin so start
                again from the stem.

        Raises:
            EngineError: the driver refuses a step.
        """
        threshold, kernels = self._network.threshold, self._kernels()
        table = mask_table([mask.tolist() for mask in masks])
        memory = self._dispatch_memory()
        if not table:
            return self._call(lambda: self._builder.dispatch_graph(self._parts, kernels, memory, threshold=threshold))
        values = np.array(table, np.uint64)
        keys = self._backend.allocate((values.nbytes,), "uint8")
        keys.write(values.reshape(-1).view(np.uint8))
        lookup = LookupMemory(masks=self._capturer.address(keys), n_masks=len(table))
        masks_in_order = [np.array(bits_from_words(words, self._network.n_blocks)) for words in table]
        build = partial(
            self._builder.cached_graph,
            self._parts,
            kernels,
            memory,
            lookup,
            paths=[self._path_behind(mask, speculation) for mask in masks_in_order],
            begun=self._graphs_of(speculation.runs),
            threshold=threshold,
        )
        return self._call(build, keep_alive=keys)

    def policy(self) -> Call | None:
        """Return a call that writes `probability` of `image`; None where the network has no policy."""
        return None if self._parts.policy is None else self._flat([self._parts.policy])

    def path(self, mask: np.ndarray) -> Call:
        """Return a call that runs `image` through the parts that a mask bool [K] keeps, as one launch."""
        runs, head = self._runs(mask)
        return self._flat([self._parts.stem, *self._graphs_of(runs), head])

    def whole(self) -> Call:
        """Return a call that runs `image` through the engine of the whole static network, as one launch."""
        return self._flat([self._add(self._network.require("full"), self.image, self.logits)])

    def release(self) -> None:
        """Give the captured graphs back, once no more graphs are made of them: those that are made have copies."""
        _run_all(self._releases)

    def _kernels(self) -> Kernels:
        device = self._capturer.device
        cubin = cubin_from_source(SOURCE, device.sm)
        names = {"dispatch": KERNEL_NAME, "lookup": LOOKUP_NAME}
        return Kernels(**{what: device.function(cubin, name) for what, name in names.items()})

    def _allocate_decision(self) -> None:
        """Make what the kernels read and write. Without a policy all blocks are kept."""
        n_blocks, allocate = self._network.n_blocks, self._backend.allocate
        self.probability = allocate((1, n_blocks), "float32")
        self.probability.write(np.ones((1, n_blocks), np.float32))
        self._has_shortcut = allocate((n_blocks,), "uint8")
        self._has_shortcut.write(np.array([self._network.shortcut(k) is not None for k in range(n_blocks)], np.uint8))

    def _dispatch_memory(self) -> DispatchMemory:
        address = self._capturer.address
        return DispatchMemory(
            probability=address(self.probability),
            has_shortcut=address(self._has_shortcut),
            force=address(self.force),
            kept=address(self.kept),
        )

    def _capture_parts(self) -> CapturedNetwork:
        network = self._network
        policy, stem, head = network.find("policy"), network.require("stem"), network.require("head")
        first, second = self._pair(head.inputs[0])
        return CapturedNetwork(
            policy=None if policy is None else self._add(policy, self.image, self.probability, beside=True),
            stem=self._add(stem, self.image, self._pair(stem.outputs[0])[0]),
            blocks=[self._capture_block(block, network.shortcut(k)) for k, block in enumerate(network.blocks)],
            heads=(self._add(head, first, self.logits), self._add(head, second, self.logits)),
        )

    def _capture_block(self, block: PartSpec, shortcut: PartSpec | None) -> CapturedBlock:
        (a, b), (to_a, to_b) = self._pair(block.inputs[0]), self._pair(block.outputs[0])
        return CapturedBlock(
            block=(self._add(block, a, to_b), self._add(block, b, to_a)),
            shortcut=None if shortcut is None else (self._add(shortcut, a, to_b), self._add(shortcut, b, to_a)),
        )

    def _pair(self, tensor: TensorSpec) -> tuple[Buffer, Buffer]:
        """Return the two buffers for activations of that shape."""
        key = (tensor.shape_for(1), tensor.dtype)
        if key not in self._pairs:
            self._pairs[key] = (self._backend.allocate(*key), self._backend.allocate(*key))
        return self._pairs[key]

    def _add(self, part: PartSpec, source: Buffer, target: Buffer, *, beside: bool = False) -> Any:
        """Capture a part from one buffer into another; return its CUgraph."""
        inputs, outputs = {part.inputs[0].name: source}, {part.outputs[0].name: target}
        try:
            captured = self._capturer.capture(self._engines[part.name], inputs, outputs, beside=beside)
        except EngineError as exc:
            if re.search(rf"\b{re.escape(part.name)}\b", str(exc)):
                raise
            raise EngineError(f"part {part.name!r}: cannot be captured: {exc}. Use --strategy chain") from exc
        self._captured.append(captured)
        self._releases.append(captured.release)
        return captured.graph

    def _path_behind(self, mask: np.ndarray, speculation: Speculation) -> list[Any]:
        """Return the captured work of a mask's path that is left when the stem and the speculation are done."""
        runs, head = self._runs(mask)
        n_begun = len(speculation.runs)
        if runs[:n_begun] == list(speculation.runs):
            return [*self._graphs_of(runs[n_begun:]), head]
        return [self._parts.stem, *self._graphs_of(runs), head]

    def _runs(self, mask: np.ndarray) -> tuple[list[Run], Any]:
        """Return what a mask runs behind the stem, and the captured head that reads where it ends."""
        if mask.shape != (self._network.n_blocks,):
            raise UsageError(
                f"a mask of shape {list(mask.shape)} has no path; this network's have {self._network.n_blocks} bits"
            )
        found, side = runs(mask.tolist(), self._parts.has_shortcut)
        return found, self._parts.heads[side]

    def _graphs_of(self, found: Sequence[Run]) -> list[Any]:
        return [self._parts.blocks[run.block].graph(run) for run in found]

    def _flat(self, parts: Sequence[Any]) -> Call:
        return self._call(lambda: self._builder.flat_graph(parts))

    def _call(self, build: Callable[[], tuple[Any, Any]], *, keep_alive: object = None) -> Call:
        """Return the launch of a graph that `build` makes, with its executable, in the device's context."""
        device = self._capturer.device
        with device.current():
            graph, executable = build()
        return launch_call(device, executable, keep_alive=(self, keep_alive), graph=graph)

    def _ms(self, call: Call) -> float:
        return fastest_ms(self._backend, call, n_runs=_TIMED_RUNS)


def _run_all(actions: list[Callable[[], object]]) -> None:
    while actions:
        actions.pop()()

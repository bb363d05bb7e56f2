"""The whole dynamic network as one launch: its parts captured, and put into a CUDA graph that decides by itself.

`engines.cuda_graph` says how the graph is built. Here is what goes into it: the buffers between which the activation
moves, and the work of each part in both directions. One image at a time, since each image decides for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bdtool.errors import UsageError
from bdtool.specs import NetworkSpec, PartSpec, TensorSpec
from engines.base import PLAIN_LAYOUT, Backend, Buffer, Call, Engine, PartEngine, run_through_buffers
from engines.capture import Captured, Capturer, CapturingBackend, launch_call
from engines.cuda_graph import CapturedNetwork, DispatchMemory, GraphBuilder
from engines.dispatch_kernel import KERNEL_NAME, SOURCE, cubin_from_source
from export.fused import fused_spec


def graph_spec(network: NetworkSpec) -> PartSpec:
    """Return the tensors of the graph: those of the fused model, but with 2 in `keep` where the policy gave NaN."""
    fused = fused_spec(network)
    logits, keep = fused.outputs
    return replace(fused, name="graph", outputs=(logits, replace(keep, dtype="uint8")))


class GraphEngine(PartEngine):
    """All parts of a network as one engine; a call is one graph launch, and nothing of the policy reaches the host.

    Raises:
        UsageError: the backend's engines cannot be captured, or a block writes more than its activation.
    """

    layout = PLAIN_LAYOUT

    def __init__(self, network: NetworkSpec, backend: Backend, engines: Mapping[str, Engine]) -> None:
        if not isinstance(backend, CapturingBackend):
            raise UsageError("strategy 'graph' needs engines that can be captured: --backend torch or tensorrt")
        if emitting := [part.name for part in network.blocks if part.emits]:
            raise UsageError(
                f"strategy 'graph' decides before block 0; {emitting[0]} has outputs for a controller. "
                "Use --strategy chain"
            )
        super().__init__(graph_spec(network))
        self._network = network
        self._backend = backend
        self._engines = engines
        self._capturer = backend.capturer()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_through_buffers(self, feeds, self._backend.allocate)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        network, device = self._network, self._capturer.device
        image, force = (inputs[tensor.name] for tensor in self.inputs)
        logits, kept = (outputs[tensor.name] for tensor in self.outputs)
        probability, has_shortcut, side = self._decision_buffers()
        captures = _Captures(self._capturer, self._engines, self._backend)
        captured = CapturedNetwork(
            policy=self._policy(captures, image, probability),
            stem=captures.add(network.require("stem"), image, captures.pair(network.require("stem").outputs[0])[0]),
            blocks=[self._bodies(captures, block, network.shortcut(k)) for k, block in enumerate(network.blocks)],
            heads=self._heads(captures, logits),
        )
        addresses = map(self._capturer.address, (probability, has_shortcut, force, kept, side))
        memory = DispatchMemory(**dict(zip(_MEMORY, addresses, strict=True)))
        kernel = device.function(cubin_from_source(SOURCE, device.sm), KERNEL_NAME)
        builder = GraphBuilder(device.cu, device.context)
        graph, executable = builder.dispatch_graph(captured, kernel, memory, threshold=network.threshold)
        captures.release()

        used = (captures, inputs, outputs, probability, has_shortcut, side)
        return launch_call(device, executable, keep_alive=used, graph=graph)

    def _decision_buffers(self) -> tuple[Buffer, Buffer, Buffer]:
        """Return P(keep), where there are shortcut parts, and the side of the head; without a policy all are kept."""
        network = self._network
        n_blocks = network.n_blocks
        probability = self._backend.allocate((1, n_blocks), "float32")
        probability.write(np.ones((1, n_blocks), np.float32))
        has_shortcut = self._backend.allocate((n_blocks,), "uint8")
        has_shortcut.write(np.array([network.shortcut(k) is not None for k in range(n_blocks)], np.uint8))
        return probability, has_shortcut, self._backend.allocate((1,), "int32")

    def _policy(self, captures: _Captures, image: Buffer, probability: Buffer) -> Any | None:
        part = self._network.find("policy")
        return None if part is None else captures.add(part, image, probability, beside=True)

    def _bodies(self, captures: _Captures, block: PartSpec, shortcut: PartSpec | None) -> Sequence[Any | None]:
        """Return the bodies of a block's SWITCH, in the order of `engines.dispatch`."""
        sources, targets = captures.pair(block.inputs[0]), captures.pair(block.outputs[0])
        parts = [block] if shortcut is None else [block, shortcut]
        directions = ((0, 1), (1, 0))
        return [None, *(captures.add(part, sources[i], targets[o]) for part in parts for i, o in directions)]

    def _heads(self, captures: _Captures, logits: Buffer) -> tuple[Any, Any]:
        part = self._network.require("head")
        first, second = captures.pair(part.inputs[0])
        return captures.add(part, first, logits), captures.add(part, second, logits)


_MEMORY = ("probability", "has_shortcut", "force", "kept", "head_side")


class _Captures:
    """The captured calls of a graph, and two buffers for each shape of the activation between them."""

    def __init__(self, capturer: Capturer, engines: Mapping[str, Engine], backend: Backend) -> None:
        self._capturer = capturer
        self._engines = engines
        self._backend = backend
        self._pairs: dict[tuple[tuple[int, ...], str], tuple[Buffer, Buffer]] = {}
        self._captured: list[Captured] = []

    def pair(self, tensor: TensorSpec) -> tuple[Buffer, Buffer]:
        shape = tensor.shape_for(1)
        if (shape, tensor.dtype) not in self._pairs:
            first, second = (self._backend.allocate(shape, tensor.dtype) for _ in range(2))
            self._pairs[shape, tensor.dtype] = first, second
        return self._pairs[shape, tensor.dtype]

    def add(self, part: PartSpec, source: Buffer, target: Buffer, *, beside: bool = False) -> Any:
        """Capture a part from one buffer into another; return its CUgraph."""
        inputs, outputs = {part.inputs[0].name: source}, {part.outputs[0].name: target}
        self._captured.append(self._capturer.capture(self._engines[part.name], inputs, outputs, beside=beside))
        return self._captured[-1].graph

    def release(self) -> None:
        """Give the captured graphs back: the graph that they went into has copies of them."""
        for captured in self._captured:
            captured.release()

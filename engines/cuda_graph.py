"""A CUDA graph that holds the decision: policy, one kernel that reads it, and conditional nodes that it sets.

Each engine's work is captured once for each direction into a graph of its own, checked, and put as a child graph into
the bodies. One launch runs an image; nothing of the policy comes back to the host before the logits do.

`dispatch_graph` has a SWITCH for every few blocks, whose bodies go from either buffer to the other; the head goes into
those of the last SWITCH. With frequent masks known, `cached_graph` has one SWITCH over their flat paths first, and
decides the others group by group within its last body; blocks that many paths begin with can run before it, beside the
policy network. SWITCH needs a driver of CUDA 12.8. Source: CUDA programming guide, "Conditional Graph Nodes".
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engines.dispatch import MAX_BLOCKS, Run, body_runs
from engines.graph_nodes import GraphNodes

# A SWITCH takes as long as some small kernels; its bodies, 2 to the power of this for either buffer, cost memory and
# time to build. Measured by benchmarks/gpu_choices.py.
BLOCKS_PER_SWITCH = 6


class _Handles(ctypes.Structure):
    """`struct Handles` of the kernels."""

    _fields_ = [("h", ctypes.c_uint64 * MAX_BLOCKS)]


@dataclass(frozen=True, kw_only=True)
class CapturedBlock:
    """Captured graphs (CUgraph) of a block's parts, each from buffer A to B, and from B to A."""

    block: tuple[Any, Any]
    shortcut: tuple[Any, Any] | None = None  # where dropping the block runs a part

    def graph(self, run: Run) -> Any:
        part = self.block if run.is_kept else self.shortcut
        assert part is not None  # `runs` was told that there is one
        return part[run.side]


@dataclass(frozen=True, kw_only=True)
class CapturedNetwork:
    """Captured graphs (CUgraph) of every part, the activation moving between buffers A and B."""

    policy: Any | None  # None: nothing to wait for, the probabilities are there
    stem: Any  # writes buffer A
    blocks: Sequence[CapturedBlock]
    heads: tuple[Any, Any]  # reading A, and B

    @property
    def has_shortcut(self) -> list[bool]:
        return [block.shortcut is not None for block in self.blocks]


@dataclass(frozen=True, kw_only=True)
class DispatchMemory:
    """Device addresses of what the kernel reads and writes; see `engines.dispatch_kernel`. `force` 0: no override."""

    probability: int
    has_shortcut: int
    force: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class LookupMemory:
    """Device address of the masks that the lookup kernel knows, rows of `engines.dispatch.mask_table`."""

    masks: int
    n_masks: int


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of `engines.dispatch_kernel`, loaded (CUfunction)."""

    dispatch: Any
    lookup: Any


class GraphBuilder:
    """Builds graphs through `driver`: the module `cuda.bindings.driver`, or a stand-in with its functions."""

    def __init__(self, driver: Any, context: Any, *, blocks_per_switch: int = BLOCKS_PER_SWITCH) -> None:
        self._nodes = GraphNodes(driver, context)
        self._per_switch = blocks_per_switch

    def dispatch_graph(
        self, network: CapturedNetwork, kernels: Kernels, memory: DispatchMemory, *, threshold: float
    ) -> tuple[Any, Any]:
        """Return (CUgraph, CUgraphExec) of the whole network. Keep everything it was made of alive as long as it.

        Raises:
            EngineError: the driver refuses a step, or a captured graph holds what no body may hold.
            ValueError: no blocks, or too many.
        """
        self._check(network)
        with self._nodes.new_graph() as graph:
            policy = self._policy(graph, network)
            stem = self._nodes.child(graph, [], network.stem)
            self._decide(graph, policy, [stem], network, kernels.dispatch, memory, threshold)
            return graph, self._nodes.instantiate(graph)

    def cached_graph(
        self,
        network: CapturedNetwork,
        kernels: Kernels,
        memory: DispatchMemory,
        lookup: LookupMemory,
        *,
        paths: Sequence[Sequence[Any]],
        begun: Sequence[Any] = (),
        threshold: float,
    ) -> tuple[Any, Any]:
        """Return (CUgraph, CUgraphExec) with one SWITCH: a body for each known mask, `dispatch_graph`'s in the last.

        Args:
            paths: for each row of the table the captured graphs of its body, in order: what is left to do behind the
                stem and `begun`, or all from the stem on.
            begun: captured graphs that run behind the stem while the policy network still decides.

        Raises:
            EngineError, ValueError: as `dispatch_graph`; or there are not as many paths as masks.
        """
        self._check(network)
        if len(paths) != lookup.n_masks:
            raise ValueError(f"{len(paths)} paths for {lookup.n_masks} masks; expected as many")
        nodes = self._nodes
        with nodes.new_graph() as graph:
            handle = nodes.handle(graph)
            arguments = _lookup_arguments(memory, lookup, handle, len(network.blocks), threshold)
            found = nodes.kernel(graph, self._policy(graph, network), kernels.lookup, arguments)
            ready = [found, *nodes.chain(graph, [network.stem, *begun])]
            _, bodies = nodes.switch(graph, ready, handle, n_bodies=len(paths) + 1)
            for index, path in enumerate(paths):
                nodes.chain(bodies[index], path)
            again = nodes.chain(bodies[-1], [network.stem] if begun else [])
            self._decide(bodies[-1], [], again, network, kernels.dispatch, memory, threshold)
            return graph, nodes.instantiate(graph)

    def flat_graph(self, parts: Sequence[Any]) -> tuple[Any, Any]:
        """Return (CUgraph, CUgraphExec) of captured graphs one after the other: a path that is known in advance."""
        with self._nodes.new_graph() as graph:
            self._nodes.chain(graph, parts)
            return graph, self._nodes.instantiate(graph)

    def begun_graph(self, network: CapturedNetwork, begun: Sequence[Any]) -> tuple[Any, Any]:
        """Return (CUgraph, CUgraphExec) of the policy network, with the stem and captured graphs beside it."""
        with self._nodes.new_graph() as graph:
            self._policy(graph, network)
            self._nodes.chain(graph, [network.stem, *begun])
            return graph, self._nodes.instantiate(graph)

    def _policy(self, graph: Any, network: CapturedNetwork) -> list[Any]:
        return [] if network.policy is None else [self._nodes.child(graph, [], network.policy)]

    def _decide(
        self,
        graph: Any,
        policy: list[Any],
        stem: list[Any],
        network: CapturedNetwork,
        kernel: Any,
        memory: DispatchMemory,
        threshold: float,
    ) -> None:
        """Add the dispatch kernel after `policy`, and after it and `stem` a SWITCH for each group of blocks."""
        groups = range(0, len(network.blocks), self._per_switch)
        handles = [self._nodes.handle(graph) for _ in groups]
        arguments = _dispatch_arguments(memory, handles, len(network.blocks), threshold, self._per_switch)
        last = [self._nodes.kernel(graph, policy, kernel, arguments), *stem]
        for first, handle in zip(groups, handles, strict=True):
            last = [self._switch(graph, last, handle, network, first)]

    def _switch(self, graph: Any, after: list[Any], handle: Any, network: CapturedNetwork, first: int) -> Any:
        """Add the SWITCH of the blocks from `first` on; the last one's bodies end with the head."""
        end = first + self._per_switch
        blocks, shortcuts = network.blocks[first:end], network.has_shortcut[first:end]
        node, bodies = self._nodes.switch(graph, after, handle, n_bodies=2 << len(blocks))
        for value, body in enumerate(bodies):
            found, side = body_runs(value, shortcuts)
            parts = [blocks[run.block].graph(run) for run in found]
            self._nodes.chain(body, [*parts, network.heads[side]] if end >= len(network.blocks) else parts)
        return node

    def _check(self, network: CapturedNetwork) -> None:
        if not 1 <= len(network.blocks) <= MAX_BLOCKS:
            raise ValueError(
                f"{len(network.blocks)} blocks; the dispatch kernel takes at least 1 and at most {MAX_BLOCKS}"
            )
        named = [("stem", network.stem), *(("head", head) for head in network.heads)]
        if network.policy is not None:
            named.append(("policy", network.policy))
        for k, block in enumerate(network.blocks):
            named += [(f"block {k}", graph) for graph in (*block.block, *(block.shortcut or ()))]
        for what, captured in named:
            self._nodes.check_content(captured, what)


def _dispatch_arguments(
    memory: DispatchMemory, handles: Sequence[Any], n_blocks: int, threshold: float, blocks_per_switch: int
) -> list[Any]:
    sizes = [ctypes.c_int(n_blocks), ctypes.c_float(threshold), ctypes.c_int(blocks_per_switch)]
    return [*_read(memory), *sizes, ctypes.c_void_p(memory.kept), _handles(handles)]


def _read(memory: DispatchMemory) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(address) for address in (memory.probability, memory.has_shortcut, memory.force)]


def _handles(handles: Sequence[Any]) -> _Handles:
    """Return the kernel's argument; None leaves a place empty."""
    filled = _Handles()
    filled.h[: len(handles)] = [0 if handle is None else int(handle) for handle in handles]
    return filled


def _lookup_arguments(
    memory: DispatchMemory, lookup: LookupMemory, handle: Any, n_blocks: int, threshold: float
) -> list[Any]:
    pointers = [ctypes.c_void_p(address) for address in (memory.probability, memory.force)]
    known = [ctypes.c_void_p(lookup.masks), ctypes.c_int(lookup.n_masks)]
    sizes = [ctypes.c_int(n_blocks), ctypes.c_float(threshold)]
    return [*pointers, *sizes, *known, ctypes.c_void_p(memory.kept), ctypes.c_uint64(int(handle))]

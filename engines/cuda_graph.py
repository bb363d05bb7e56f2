"""A CUDA graph that holds the decision: policy, one kernel that reads it, and a SWITCH for every few blocks.

The graph is built node by node. Each engine's work is captured once for each direction into a graph of its own,
checked, and put as a child graph into the bodies; the head goes into those of the last SWITCH. One launch runs an
image; nothing of the policy comes back to the host before the logits do. With frequent masks known, one SWITCH over
their flat paths goes first, and the others are decided group by group within its last body. Source: CUDA programming
guide, "Conditional Graph Nodes", which lists what a body may hold.

Needs a driver of CUDA 12.8 or newer (SWITCH). Written against cuda-bindings 12.9 to 13.x; run on an H100 with 13.3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bdtool.errors import EngineError
from engines.cuda_device import checked
from engines.dispatch import MAX_BLOCKS, Run, body_runs
from engines.dispatch_kernel import N_THREADS

# A SWITCH takes as long as some small kernels; its bodies, 2 to the power of this for either buffer, cost memory and
# time to build. Measured by benchmarks/gpu_choices.py.
BLOCKS_PER_SWITCH = 6

_ALLOWED_IN_BODY = ("KERNEL", "MEMCPY", "MEMSET", "EMPTY", "GRAPH", "CONDITIONAL")
_PREFIX = "CU_GRAPH_NODE_TYPE_"


class _Handles(ctypes.Structure):
    """`struct Handles` of the kernel."""

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
        self._cu = driver
        self._context = context
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
        graph = self._call(self._cu.cuGraphCreate(0))
        policy = self._policy(graph, network)
        stem = self._child(graph, [], network.stem)
        self._decide(graph, policy, [stem], network, kernels.dispatch, memory, threshold)
        return graph, self.instantiate(graph)

    def cached_graph(
        self,
        network: CapturedNetwork,
        kernels: Kernels,
        memory: DispatchMemory,
        lookup: LookupMemory,
        *,
        paths: Sequence[Sequence[Any]],
        threshold: float,
    ) -> tuple[Any, Any]:
        """Return (CUgraph, CUgraphExec) with one SWITCH: a body for each known mask, `dispatch_graph`'s in the last.

        Args:
            paths: for each row of the table the captured graphs behind the stem, in order.

        Raises:
            EngineError, ValueError: as `dispatch_graph`; or there are not as many paths as masks.
        """
        self._check(network)
        if len(paths) != lookup.n_masks:
            raise ValueError(f"{len(paths)} paths for {lookup.n_masks} masks; expected as many")
        graph = self._call(self._cu.cuGraphCreate(0))
        handle = self._handle(graph)
        arguments = _lookup_arguments(memory, lookup, handle, len(network.blocks), threshold)
        found = self._kernel(graph, self._policy(graph, network), kernels.lookup, arguments)
        stem = self._child(graph, [], network.stem)
        _, bodies = self._conditional(graph, [found, stem], handle, len(paths) + 1)
        for index, path in enumerate(paths):
            self._chain(bodies[index], path)
        self._decide(bodies[-1], [], [], network, kernels.dispatch, memory, threshold)
        return graph, self.instantiate(graph)

    def flat_graph(self, parts: Sequence[Any]) -> tuple[Any, Any]:
        """Return (CUgraph, CUgraphExec) of captured graphs one after the other: a path that is known in advance."""
        graph = self._call(self._cu.cuGraphCreate(0))
        self._chain(graph, parts)
        return graph, self.instantiate(graph)

    def _policy(self, graph: Any, network: CapturedNetwork) -> list[Any]:
        return [] if network.policy is None else [self._child(graph, [], network.policy)]

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
        handles = [self._handle(graph) for _ in groups]
        arguments = _kernel_arguments(memory, handles, len(network.blocks), threshold, self._per_switch)
        last = [self._kernel(graph, policy, kernel, arguments), *stem]
        for first, handle in zip(groups, handles, strict=True):
            last = [self._switch(graph, last, handle, network, first)]

    def _switch(self, graph: Any, after: list[Any], handle: Any, network: CapturedNetwork, first: int) -> Any:
        """Add the SWITCH of the blocks from `first` on; the last one's bodies end with the head."""
        end = first + self._per_switch
        blocks, shortcuts = network.blocks[first:end], network.has_shortcut[first:end]
        node, bodies = self._conditional(graph, after, handle, 2 << len(blocks))
        for value, body in enumerate(bodies):
            found, side = body_runs(value, shortcuts)
            parts = [blocks[run.block].graph(run) for run in found]
            self._chain(body, [*parts, network.heads[side]] if end >= len(network.blocks) else parts)
        return node

    def _chain(self, graph: Any, parts: Sequence[Any]) -> None:
        last: list[Any] = []
        for part in parts:
            last = [self._child(graph, last, part)]

    def _handle(self, graph: Any) -> Any:
        """Make a conditional handle that every launch resets to 0: skip."""
        flag = self._cu.CU_GRAPH_COND_ASSIGN_DEFAULT
        return self._call(self._cu.cuGraphConditionalHandleCreate(graph, self._context, 0, flag))

    def _child(self, graph: Any, after: list[Any], child: Any) -> Any:
        return self._call(self._cu.cuGraphAddChildGraphNode(graph, after or None, len(after), child))

    def _kernel(self, graph: Any, after: list[Any], function: Any, arguments: Sequence[Any]) -> Any:
        cu = self._cu
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        params = cu.CUgraphNodeParams()
        params.type = cu.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
        kernel = params.kernel
        kernel.func = function
        kernel.gridDimX = kernel.gridDimY = kernel.gridDimZ = 1
        kernel.blockDimX, kernel.blockDimY, kernel.blockDimZ = N_THREADS, 1, 1
        kernel.sharedMemBytes = 0
        kernel.kernelParams = ctypes.addressof(pointers)  # the driver copies the values when the node is added
        return self._add(graph, after, params)

    def _conditional(self, graph: Any, after: list[Any], handle: Any, n_bodies: int) -> tuple[Any, list[Any]]:
        """Add a SWITCH; return its node, and the graphs of its bodies, which are empty and belong to it."""
        cu = self._cu
        params = cu.CUgraphNodeParams()
        params.type = cu.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        conditional = params.conditional
        conditional.handle = handle
        conditional.ctx = self._context
        conditional.size = n_bodies
        conditional.type = cu.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH
        node = self._add(graph, after, params)
        return node, [cu.CUgraph(int(params.conditional.phGraph_out[index])) for index in range(n_bodies)]

    def _add(self, graph: Any, after: list[Any], params: Any) -> Any:
        cu, dependencies = self._cu, after or None
        if hasattr(cu, "cuGraphAddNode_v2"):  # 12.x: the plain one takes no edge data; 13.x: it does
            return self._call(cu.cuGraphAddNode(graph, dependencies, len(after), params))
        return self._call(cu.cuGraphAddNode(graph, dependencies, None, len(after), params))

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
            self._check_content(captured, what)

    def _check_content(self, captured: Any, what: str) -> None:
        """Refuse what no body may hold; the driver would only say "invalid argument", when all is put together."""
        cu = self._cu
        _, n_nodes = self._call(cu.cuGraphGetNodes(captured, 0))
        nodes, _ = self._call(cu.cuGraphGetNodes(captured, n_nodes))
        kinds = {self._call(cu.cuGraphNodeGetType(node)).name.removeprefix(_PREFIX) for node in nodes}
        if bad := sorted(kinds - set(_ALLOWED_IN_BODY)):
            raise EngineError(
                f"{what}: its captured work holds {', '.join(bad)} nodes, which a conditional body may not hold. "
                "Let the engine allocate nothing and record no events while it is captured"
            )

    def instantiate(self, graph: Any) -> Any:
        """Return the CUgraphExec of a CUgraph, which may be destroyed then."""
        params = self._cu.CUDA_GRAPH_INSTANTIATE_PARAMS()
        return self._call(self._cu.cuGraphInstantiateWithParams(graph, params))

    def _call(self, result: tuple[Any, ...]) -> Any:
        return checked(self._cu, result, "a step of the graph")


def _kernel_arguments(
    memory: DispatchMemory, handles: Sequence[Any], n_blocks: int, threshold: float, blocks_per_switch: int
) -> list[Any]:
    switches = _Handles()
    switches.h[: len(handles)] = [int(handle) for handle in handles]
    pointers = [ctypes.c_void_p(address) for address in (memory.probability, memory.has_shortcut, memory.force)]
    sizes = [ctypes.c_int(n_blocks), ctypes.c_float(threshold), ctypes.c_int(blocks_per_switch)]
    return [*pointers, *sizes, ctypes.c_void_p(memory.kept), switches]


def _lookup_arguments(
    memory: DispatchMemory, lookup: LookupMemory, handle: Any, n_blocks: int, threshold: float
) -> list[Any]:
    pointers = [ctypes.c_void_p(address) for address in (memory.probability, memory.force)]
    known = [ctypes.c_void_p(lookup.masks), ctypes.c_int(lookup.n_masks)]
    sizes = [ctypes.c_int(n_blocks), ctypes.c_float(threshold)]
    return [*pointers, *sizes, *known, ctypes.c_void_p(memory.kept), ctypes.c_uint64(int(handle))]

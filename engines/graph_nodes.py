"""Nodes of a CUDA graph, added one by one through the driver's API.

Written against cuda-bindings 12.9 to 13.x; run on an H100 with 13.3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bdtool.errors import EngineError
from engines.cuda_device import checked
from engines.dispatch_kernel import N_THREADS

# Source: CUDA programming guide, "Conditional Graph Nodes"
_ALLOWED_IN_BODY = ("KERNEL", "MEMCPY", "MEMSET", "EMPTY", "GRAPH", "CONDITIONAL")
_PREFIX = "CU_GRAPH_NODE_TYPE_"


class GraphNodes:
    """Adds nodes through `driver`: the module `cuda.bindings.driver`, or a stand-in with its functions.

    All methods raise EngineError where the driver refuses a step. `after` lists the nodes that a new one waits for.
    """

    def __init__(self, driver: Any, context: Any) -> None:
        self._cu = driver
        self._context = context

    @contextmanager
    def new_graph(self) -> Iterator[Any]:
        """Give an empty CUgraph, which is given back where it cannot be finished."""
        graph = self._call(self._cu.cuGraphCreate(0), "a new graph")
        try:
            yield graph
        except BaseException:
            self._cu.cuGraphDestroy(graph)
            raise

    def handle(self, graph: Any) -> Any:
        """Make a conditional handle that every launch resets to 0: the first body."""
        flag = self._cu.CU_GRAPH_COND_ASSIGN_DEFAULT
        return self._call(
            self._cu.cuGraphConditionalHandleCreate(graph, self._context, 0, flag), "a conditional handle"
        )

    def child(self, graph: Any, after: list[Any], child: Any) -> Any:
        added = self._cu.cuGraphAddChildGraphNode(graph, after or None, len(after), child)
        return self._call(added, "captured work as a child graph")

    def chain(self, graph: Any, parts: Sequence[Any]) -> list[Any]:
        """Add captured graphs one after the other; return the last one's node, if there are any."""
        last: list[Any] = []
        for part in parts:
            last = [self.child(graph, last, part)]
        return last

    def kernel(self, graph: Any, after: list[Any], function: Any, arguments: Sequence[Any]) -> Any:
        """Add one of `engines.dispatch_kernel`: one group of `N_THREADS` threads."""
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
        return self._add(graph, after, params, "a kernel")

    def switch(self, graph: Any, after: list[Any], handle: Any, *, n_bodies: int) -> tuple[Any, list[Any]]:
        """Add a SWITCH; return it, and the graphs of its bodies, which are empty and belong to it.

        It runs the body of the number that the handle was set to, if there is one.
        """
        cu = self._cu
        params = cu.CUgraphNodeParams()
        params.type = cu.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        conditional = params.conditional
        conditional.handle = handle
        conditional.ctx = self._context
        conditional.size = n_bodies
        conditional.type = cu.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_SWITCH
        node = self._add(graph, after, params, f"a SWITCH of {n_bodies} bodies")
        return node, [cu.CUgraph(int(params.conditional.phGraph_out[index])) for index in range(n_bodies)]

    def check_content(self, captured: Any, what: str) -> None:
        """Refuse what no body may hold; the driver would only say "invalid argument", when all is put together."""
        cu = self._cu
        asked = f"to list the nodes of {what}"
        _, n_nodes = self._call(cu.cuGraphGetNodes(captured, 0), asked)
        nodes, _ = self._call(cu.cuGraphGetNodes(captured, n_nodes), asked)
        kinds = {self._call(cu.cuGraphNodeGetType(node), asked).name.removeprefix(_PREFIX) for node in nodes}
        if bad := sorted(kinds - set(_ALLOWED_IN_BODY)):
            raise EngineError(
                f"{what}: its captured work holds {', '.join(bad)} nodes, which a conditional body may not hold. "
                "Let the engine allocate nothing and record no events while it is captured"
            )

    def instantiate(self, graph: Any) -> Any:
        """Return the CUgraphExec of a CUgraph, which may be destroyed then."""
        params = self._cu.CUDA_GRAPH_INSTANTIATE_PARAMS()
        made = self._cu.cuGraphInstantiateWithParams(graph, params)
        return self._call(made, f"to instantiate the graph ({params.result_out.name})")

    def _add(self, graph: Any, after: list[Any], params: Any, what: str) -> Any:
        cu, dependencies = self._cu, after or None
        if hasattr(cu, "cuGraphAddNode_v2"):  # 12.x: the plain one takes no edge data; 13.x: it does
            return self._call(cu.cuGraphAddNode(graph, dependencies, len(after), params), what)
        return self._call(cu.cuGraphAddNode(graph, dependencies, None, len(after), params), what)

    def _call(self, result: tuple[Any, ...], what: str) -> Any:
        try:
            return checked(self._cu, result, what)
        except EngineError as exc:
            raise EngineError(
                f"CUDA graph: {exc}. Use another --cuda-graph mode (off: plain launches), or --strategy chain"
            ) from exc

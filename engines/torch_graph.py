"""PyTorch's work captured for a CUDA graph that is not PyTorch's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bdtool.errors import EngineError
from engines.base import Buffer, Engine
from engines.capture import Captured
from engines.cuda_device import CudaDevice, checked, nothing_collected
from engines.torch_errors import engine_error

_WARM_UP_CALLS = 3  # cuDNN chooses its kernels and cuBLAS makes its workspace before anything is captured


class TorchCapturer:
    """Captures calls of torch engines. `device` enqueues on PyTorch's current stream, as its buffers do.

    A captured call's own tensors live in a memory pool of PyTorch's. Calls that run one after the other share one; what
    runs beside them has another.
    """

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        # PyTorch's own default for captures belongs to the GPU that captured first
        self._stream = torch.cuda.Stream(device.index)  # type: ignore[no-untyped-call]
        self._pools = [torch.cuda.graph_pool_handle() for _ in range(2)]

    def address(self, buffer: Buffer) -> int:
        address: int = buffer.tensor.data_ptr()  # type: ignore[attr-defined]  # a buffer of the torch backend
        return address

    def capture(
        self, engine: Engine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], *, beside: bool
    ) -> Captured:
        call = engine.bind(inputs, outputs)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        current = torch.cuda.current_stream(self.device.index)
        try:
            # the outer `stream` is for captures that fail: PyTorch 2.11 leaves theirs the thread's current one
            with torch.cuda.device(self.device.index), torch.cuda.stream(current):
                # what was enqueued before may be filling the buffers, or making the weights
                self._stream.wait_stream(current)
                with torch.cuda.stream(self._stream):
                    for _ in range(_WARM_UP_CALLS):
                        call()
                torch.cuda.synchronize()
                capturing = torch.cuda.graph(
                    graph, pool=self._pools[beside], stream=self._stream, capture_error_mode="thread_local"
                )
                with nothing_collected(), capturing:
                    call()
        except RuntimeError as exc:
            raise engine_error("PyTorch cannot capture its work in a CUDA graph", exc) from exc
        cu = self.device.cu
        raw: Any = cu.CUgraph(graph.raw_cuda_graph())
        _, n_nodes = checked(cu, cu.cuGraphGetNodes(raw, 0), "the captured work")
        if not n_nodes:  # PyTorch warns of it, or of nothing
            raise EngineError("PyTorch captured no work: it went to another stream than the one captured")
        return Captured(graph=raw, keep_alive=(graph, call))  # PyTorch owns the graph and its share of the pool

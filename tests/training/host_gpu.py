"""A GPU for training that is a stand-in: its tensors lie on the host, and an operation on some of both is refused.

PyTorch's CPU kernels compute, so what is trained there is what is trained on the CPU, but for the order in which
optimizers compute on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bdtool.training import tasks, trainer

DEVICE = torch.device("cuda:0")
_HOST = torch.device("cpu")
_COPY = "aten::copy_"
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # takes host's numbers, too


class HostGpu:
    """Within `running()`, in this thread and those of the trainer, `DEVICE` is a device that tensors can be on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._there: dict[int, StorageWeakRef] = {}  # which keep an address from being used again
        autocast, running = tasks.autocast, self.running

        class Workers(ThreadPoolExecutor):
            def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
                def work_there() -> Any:
                    with running():
                        return work(*arguments)

                return super().submit(work_there)

        monkeypatch.setattr(trainer, "ThreadPoolExecutor", Workers)
        monkeypatch.setattr(tasks, "autocast", lambda device, *, enabled: autocast(_HOST, enabled=enabled))

    @contextmanager
    def running(self) -> Iterator[None]:
        with _Names(self), _Operations(self):
            yield

    def has(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._there

    def take(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            self._there[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def leave(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            self._there.pop(tensor.untyped_storage()._cdata, None)
        return tensor

    def check(self, name: str, arguments: Any) -> bool:
        """Return whether an operation is the GPU's; refuse one whose operands lie on both, as CUDA does."""
        tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
        others = [tensor for tensor in tensors if tensor.dim() and not self.has(tensor)]
        if len(others) == len(tensors) or not any(self.has(tensor) for tensor in tensors):
            return False
        takes_both = name == _COPY or (name in _INDEXED and self.has(tensors[0]))
        if others and not takes_both:
            shapes = [(str(DEVICE if self.has(tensor) else _HOST), tuple(tensor.shape)) for tensor in tensors]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {shapes}")
        return name != _COPY


class _Names(TorchFunctionMode):
    """Puts on the host what goes to the GPU, and says that it is on the GPU."""

    def __init__(self, gpu: HostGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if func is torch._C._nn._parse_to:
            return func(*arguments, **options)
        is_there = bool(arguments) and isinstance(arguments[0], Tensor) and self._gpu.has(arguments[0])
        if func == Tensor.device.__get__ and is_there:
            return DEVICE
        if func is Tensor.numpy and is_there:
            raise TypeError("can't convert a tensor of cuda:0 to numpy, which takes the host's")
        named = [value for value in (*arguments, *options.values()) if isinstance(value, torch.device)]
        result = func(*tree_map(_on_host, arguments), **tree_map(_on_host, options))
        moves = func is Tensor.cpu or (func is Tensor.to and bool(named))
        if DEVICE in named or (is_there and func is Tensor.__deepcopy__):
            return self._gpu.take(result.clone() if result is arguments[0] else result)
        return self._gpu.leave(result.clone()) if moves and is_there else result


class _Operations(TorchDispatchMode):
    def __init__(self, gpu: HostGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        is_there = self._gpu.check(func._schema.name, (arguments, options or {}))
        result = func(*arguments, **(options or {}))
        if not is_there:
            return result
        return tree_map(lambda value: self._gpu.take(value) if isinstance(value, Tensor) else value, result)


def _on_host(value: Any) -> Any:
    return _HOST if isinstance(value, torch.device) else value

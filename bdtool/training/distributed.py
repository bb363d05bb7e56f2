"""One process, or several by `torchrun`: who this process is, and what it shares with the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdtool.errors import UsageError
from bdtool.words import counted

# while the first process measures, or asks the policy network of every training image, the others wait: with ImageNet
# for longer than the 10 minutes of NCCL; one that died torchrun sees itself
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes that train together; each takes every `size`-th image of a batch, from `rank` on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module to call: itself, or one that averages the gradients over all processes."""
        if self.size == 1:
            return module
        # blocks that no image of a process keeps have no gradient there; buffers are those of the first process, which
        # is the default: what asks for it has another name since PyTorch 2.15
        return DistributedDataParallel(module, find_unused_parameters=True)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes; every process has to call it."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
            values = values / self.size
        return values.cpu()

    def from_first(self, values: Tensor) -> Tensor:
        """Return the values of the first process; every process has to call it, with as many of the same type."""
        if self.size > 1:
            dist.broadcast(values, src=0)
        return values


@contextmanager
def open_group(device: torch.device) -> Iterator[Group]:
    """Join the processes that `torchrun` started, or give a group of one where it did not.

    Raises:
        UsageError: it started more processes on this machine than torch sees GPUs, or `device` is one GPU for all.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group(rank=0, size=1, device=device)
        return
    if device.type == "cuda":
        if device.index is not None:
            raise UsageError(
                f"device {device}: under torchrun each process takes a GPU of its own, from cuda:0 on; give --device "
                "cuda, and which GPUs these shall be in the environment variable CUDA_VISIBLE_DEVICES"
            )
        device = _gpu_of(int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    yield Group(rank=dist.get_rank(), size=size, device=device)
    # not after an error: NCCL would wait here for the other processes, which wait in their next step for this one, and
    # torchrun, which ends them all once one of them fails, would not hear of it
    dist.destroy_process_group()


def _gpu_of(local_rank: int) -> torch.device:
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise UsageError(
            f"torchrun: process {local_rank + 1} of this machine needs a GPU of its own, torch sees "
            f"{counted(n_gpus, 'GPU')}; give --nproc-per-node {n_gpus}"
        )
    return torch.device("cuda", local_rank)


def synchronize_batch_norms(module: nn.Module) -> None:
    """Let every batch norm of `module`, in place, take its statistics over the batches of all processes.

    So the gradient of a batch is the same on one process and on several. torch.nn.SyncBatchNorm is for GPUs only.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _SharedBatchNorm.around(child))
        else:
            synchronize_batch_norms(child)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, each of which has a loss that depends on it: gradients add up as well.

    `torch.distributed.nn.functional` has the same, deprecated since PyTorch 2.15; what it names instead is private.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _sum(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _sum(*gradients)


def _sum(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over all processes, which hold equally many images."""

    @classmethod
    def around(cls, layer: nn.BatchNorm2d) -> _SharedBatchNorm:
        shared = cls(layer.num_features, eps=layer.eps, momentum=layer.momentum)
        shared.weight, shared.bias = layer.weight, layer.bias
        shared.running_mean, shared.running_var = layer.running_mean, layer.running_var
        shared.num_batches_tracked = layer.num_batches_tracked
        return shared

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        # the statistics in float32, also under autocast
        wide = x.float()
        local = torch.stack([wide.mean(dim=(0, 2, 3)), (wide * wide).mean(dim=(0, 2, 3))])
        mean, mean_square = _SumOverProcesses.apply(local) / dist.get_world_size()
        variance = (mean_square - mean * mean).clamp(min=0)
        self._track(mean.detach(), variance.detach(), n_values=dist.get_world_size() * x.numel() // x.shape[1])
        y = (wide - mean[:, None, None]) * torch.rsqrt(variance + self.eps)[:, None, None]
        z: Tensor = (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)
        return z

    def _track(self, mean: Tensor, variance: Tensor, *, n_values: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (n_values / (n_values - 1)), self.momentum)

"""PyTorch's names for streams of the driver, and how its current one and another wait for each other."""

from __future__ import annotations

import torch

from engines.device_array import LEGACY_STREAM, PER_THREAD_STREAM


def torch_stream(stream: int, device: torch.device | int) -> torch.cuda.Stream:
    """Return the stream of that number; 0 and 1 are the default one. PyTorch has no name for the one of each thread."""
    if stream in (0, LEGACY_STREAM):
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(stream, device=device)  # type: ignore[no-untyped-call]


def wait_for(stream: int, device: torch.device) -> None:
    """Let PyTorch's current stream wait for another one, whose number is the driver's or, of two, has a meaning."""
    if stream == PER_THREAD_STREAM:  # PyTorch has no name for it
        torch.cuda.synchronize(device)
    else:
        torch.cuda.current_stream(device).wait_stream(torch_stream(stream, device))


def hold_back(stream: int, device: torch.device) -> None:
    """Let another stream wait for PyTorch's current one: it may give the memory that was read to others next."""
    if stream == PER_THREAD_STREAM:
        torch.cuda.synchronize(device)
    else:
        torch_stream(stream, device).wait_stream(torch.cuda.current_stream(device))

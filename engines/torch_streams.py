"""PyTorch's names for streams of the driver."""

from __future__ import annotations

import torch

from engines.device_array import LEGACY_STREAM


def torch_stream(stream: int, device: torch.device | int) -> torch.cuda.Stream:
    """Return the stream of that number; 0 and 1 are the default one. PyTorch has no name for the one of each thread."""
    if stream in (0, LEGACY_STREAM):
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(stream, device=device)  # type: ignore[no-untyped-call]

"""FP32 that is exact in PyTorch: a program may allow operands rounded to TF32 or BF16, as
`torch.set_float32_matmul_precision("high")` does, for models of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_REDUCED = ("tf32", "bf16")


def convolutions(device: torch.device) -> Any:
    """Return PyTorch's settings of convolutions on such a device."""
    return torch.backends.cudnn.conv if device.type == "cuda" else torch.backends.mkldnn.conv  # type: ignore[attr-defined]


def matrix_products(device: torch.device) -> Any:
    """Return PyTorch's settings of matrix products on such a device."""
    return torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@contextmanager
def exact(*settings: Any) -> Iterator[None]:
    """Round no FP32 operands within; then what the program allowed counts again."""
    reduced = [(one, before) for one in settings if (before := one.fp32_precision) in _REDUCED]
    for one, _ in reduced:
        one.fp32_precision = "ieee"
    try:
        yield
    finally:
        for one, before in reduced:
            one.fp32_precision = before


def convolve_exactly(device: torch.device) -> None:
    """Round no FP32 operands of convolutions from now on; by default cuDNN rounds them to TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        # RNNs, too, as PyTorch does not give the flag where the two differ
        torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    # without it, what a program set for all of PyTorch counts (`torch.backends.fp32_precision`)
    convolutions(device).fp32_precision = "ieee"

"""What PyTorch raises where the GPU has no memory left, or work on it failed, as our errors with what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bdtool.errors import EngineError
from engines.cuda_device import FREE_MEMORY, START_AGAIN

# both are RuntimeErrors, which a controller may raise, too
GPU_ERRORS = (torch.OutOfMemoryError, torch.AcceleratorError)
# cudaErrorIllegalAddress and cudaErrorLaunchFailure: no call works after them
_FATAL = re.compile(r"illegal memory access|unspecified launch failure")


def engine_error(what: str, error: Exception) -> EngineError:
    """Return the error that says of `what` why PyTorch failed, in one line, and what to do."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    advice = _advice_on(error)
    return EngineError(f"{what}: {reason}" + (f". {advice}" if advice else ""))


def _advice_on(error: Exception) -> str | None:
    """Return what to do where it is the GPU that failed."""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in str(error):
        return FREE_MEMORY
    return START_AGAIN if _FATAL.search(str(error)) else None


@contextmanager
def gpu_errors_translated(what: str) -> Iterator[None]:
    """Turn what the GPU fails in inside into EngineError; for what is done once, as it takes microseconds."""
    try:
        yield
    except GPU_ERRORS as exc:
        raise engine_error(what, exc) from exc

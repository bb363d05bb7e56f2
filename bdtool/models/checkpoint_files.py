"""Reading checkpoints of other projects without running anything in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bdtool.errors import CheckpointError

_RESAVE = "where you trust it, load it in its own project and save model.state_dict() with torch.save"


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Return the content of a `.safetensors` file, or of a file by `torch.save` of any age, on the CPU.

    Files by `torch.save` are pickles. They are read by torch's restricted unpickler, which makes tensors and plain
    containers and refuses everything else, so nothing in the file is executed.

    Raises:
        CheckpointError: the file is unreadable or truncated, needs more than tensors, or holds no dict.
    """
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state_dict; {_RESAVE}")
    return {str(key): value for key, value in content.items()}


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except SafetensorError as exc:
        raise CheckpointError(f"{path} is not a whole safetensors file ({exc}); download it again") from exc


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except Exception as exc:  # a damaged pickle fails with whatever its broken bytes happen to ask for
        if reason := _needs_more_than_weights(str(exc)):
            raise CheckpointError(f"{path} needs more than weights ({reason}) and is not loaded; {_RESAVE}") from exc
        raise CheckpointError(
            f"{path} is truncated, or not a checkpoint by torch.save but for instance a plain pickle "
            f"({type(exc).__name__}); download it again, or {_RESAVE}"
        ) from exc


def _needs_more_than_weights(message: str) -> str | None:
    """Return what torch's unpickler refused, or None where the file is just broken."""
    if "TorchScript" in message:
        return "a TorchScript program"
    if "legacy .tar format" in message:
        return "the tar format from before PyTorch 0.1.10"
    refused = re.search(r"GLOBAL ([\w.]+)", message)
    return f"it asks for {refused[1]}" if refused else None

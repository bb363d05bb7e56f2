"""bdtool: deploy BlockDrop networks as one policy engine plus one engine per residual block."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdtool.errors import BdtoolError
    from bdtool.runtime.orchestrator import Orchestrator
    from bdtool.runtime.path_cache import PathOptions
    from bdtool.runtime.result import RunResult

# Since 1.29 ONNX Runtime tells Microsoft of each process that imports it, keeps an identity of the machine in ~/.cache,
# and its thread for that lets no fork of the process come to an end. It asks this variable as it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["BdtoolError", "Orchestrator", "PathOptions", "RunResult"]

_MODULES = {
    "BdtoolError": "bdtool.errors",
    "Orchestrator": "bdtool.runtime.orchestrator",
    "PathOptions": "bdtool.runtime.path_cache",
    "RunResult": "bdtool.runtime.result",
}


def __getattr__(name: str) -> Any:
    # Lazy: `import bdtool` and `bdtool --help` load neither torch nor onnxruntime.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

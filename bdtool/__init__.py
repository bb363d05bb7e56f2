"""bdtool: deploy BlockDrop networks as one policy engine plus one engine per residual block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdtool.errors import BdtoolError
    from bdtool.runtime.orchestrator import Orchestrator
    from bdtool.runtime.paths import PathOptions
    from bdtool.runtime.result import RunResult

__all__ = ["BdtoolError", "Orchestrator", "PathOptions", "RunResult"]

_MODULES = {
    "BdtoolError": "bdtool.errors",
    "Orchestrator": "bdtool.runtime.orchestrator",
    "PathOptions": "bdtool.runtime.paths",
    "RunResult": "bdtool.runtime.result",
}


def __getattr__(name: str) -> Any:
    # Lazy: `import bdtool` and `bdtool --help` load neither torch nor onnxruntime.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

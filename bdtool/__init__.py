"""bdtool: deploy BlockDrop networks as one policy engine plus one engine per residual block."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdtool.runtime.orchestrator import Orchestrator
    from bdtool.runtime.result import RunResult

__all__ = ["Orchestrator", "RunResult"]


def __getattr__(name: str) -> Any:
    # Lazy: `import bdtool` and `bdtool --help` load neither torch nor onnxruntime.
    if name in __all__:
        from bdtool.runtime import orchestrator

        return getattr(orchestrator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""TensorRT 10, TensorRT 11 and TensorRT-RTX behind one face: the only file that imports them.

The three share their Python classes; what differs is said here once, so that the builder has one code path. All of
them build strongly typed networks only (10.x needs the flag, the others accept it): precision comes from ONNX types.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bdtool.errors import BackendError, UsageError
from engines.extras import install_for
from engines.libcuda import driver_from_libcuda
from engines.trt_interrupts import interrupts_held
from engines.trt_options import TENSORRT, TENSORRT_RTX
from export import packages

logger = logging.getLogger(__name__)

DISTRIBUTIONS = {  # any of these provides the module
    TENSORRT: ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    TENSORRT_RTX: ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx"),
}
_EXTRA = {TENSORRT: "tensorrt", TENSORRT_RTX: "rtx"}
_NEEDS = {
    TENSORRT: "it needs an NVIDIA GPU and its driver, for building too",
    TENSORRT_RTX: "it builds without a GPU",
}

# Never freed: the first log that TensorRT is given stays its global one until no builder or runtime is left, those of
# libraries that were opened later included.
_logs: list[Any] = []


def installed_version(backend: str) -> str:
    """Return the version of "tensorrt" or "tensorrt-rtx" without importing it.

    Raises:
        BackendError: it is not installed.
    """
    for distribution in DISTRIBUTIONS[backend]:
        if (version := packages.installed_version(distribution)) is not None:
            return version
    raise BackendError(
        f"backend {backend!r} is not installed; add it with: {_install_command(backend)} "
        f"({_NEEDS[backend]}). `bdtool doctor` says what works here"
    )


@dataclass(frozen=True)
class TensorRTLibrary:
    """An imported library and its log. `module` has TensorRT's classes, whichever of the three it is."""

    name: str  # "tensorrt" or "tensorrt-rtx"
    module: Any
    log: Any  # its ILogger

    @property
    def is_rtx(self) -> bool:
        return self.name == TENSORRT_RTX

    @property
    def title(self) -> str:
        """Name and version as part of a file name: "tensorrt10.14.1"."""
        return f"{self.name}{self.module.__version__}"

    @property
    def has_timing_cache(self) -> bool:
        """TensorRT-RTX compiles ahead of time and times nothing while it builds; there is nothing to cache."""
        return not self.is_rtx

    @contextmanager
    def quoting(self, what: str, error: type[BackendError]) -> Iterator[list[int]]:
        """Turn any failure inside into `error`, with what the library logged meanwhile.

        A Ctrl-C waits for the end of what is inside, which gets the list of those that came.

        TensorRT says why it failed only in its log; the call itself gives None, False, or a bare TypeError.
        """
        self.log.errors.clear()
        try:
            with interrupts_held() as interrupts:
                yield interrupts
        except BackendError:
            raise
        except Exception as exc:
            raise error(f"{what}: {self.quoted() or exc}") from exc

    def quoted(self) -> str:
        """Return the errors logged since `quoting` began, in one line."""
        return "; ".join(dict.fromkeys(" ".join(text.split()) for text in self.log.errors))

    def targets(self) -> list[int]:
        """Return the compute capabilities that this TensorRT-RTX builds for and runs on; 75 is 7.5."""
        return sorted(int(name[2:]) for name in self.module.ComputeCapability.__members__ if name.startswith("SM"))

    def check_targets(self, sms: tuple[int, ...]) -> None:
        """Raise UsageError unless this TensorRT-RTX builds for each of these compute capabilities."""
        known = self.targets()
        if unknown := sorted(set(sms) - set(known)):
            raise UsageError(
                f"{self.name} {self.module.__version__} builds for the compute capabilities "
                f"{', '.join(map(str, known))}, not for {', '.join(map(str, unknown))}. Give others with --sm, or use "
                "--backend torch on that GPU"
            )


def load_library(backend: str) -> TensorRTLibrary:
    """Import "tensorrt" or "tensorrt-rtx".

    Raises:
        BackendError: it is not installed, or cannot be imported here.
    """
    installed_version(backend)
    try:
        return library_from_module(backend, _import_rtx() if backend == TENSORRT_RTX else _import_tensorrt())
    except (ImportError, OSError) as exc:
        raise BackendError(
            f"backend {backend!r} is installed but cannot be imported ({exc}); install it again: "
            f"{_install_command(backend)}"
        ) from exc


def _install_command(backend: str) -> str:
    return install_for(_EXTRA[backend], driver_from_libcuda())


def library_from_module(backend: str, module: Any) -> TensorRTLibrary:
    """Return a library on an imported module, or on one with its classes."""
    library = TensorRTLibrary(backend, module, _log_class(module)())
    _logs.append(library.log)
    return library


def _import_tensorrt() -> Any:
    import tensorrt

    return tensorrt


def _import_rtx() -> Any:
    try:
        import tensorrt_rtx  # the package of all parts, where it is installed
    except ModuleNotFoundError:
        import tensorrt_rtx_bindings  # what the extra `rtx` installs: the same module

        return tensorrt_rtx_bindings
    return tensorrt_rtx


def _log_class(module: Any) -> type[Any]:
    """Return a class of log that keeps errors for our own messages and passes warnings on."""
    base = module.ILogger
    failures = (base.INTERNAL_ERROR, base.ERROR)

    class Log(base):  # type: ignore[misc, valid-type]  # a class of the module we were given
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 wants it named
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in failures:
                self.errors.append(message)
            elif severity == base.WARNING:
                logger.info("%s", message)

    return Log

"""Every error that bdtool raises on purpose, as a tree.

A message names the thing, what came, what was expected and what to do next. The command line prints it in one line
and exits with the class's `exit_code`; wrong arguments to Python functions stay ValueError and TypeError.

    BdtoolError
    ├── UsageError              the user asked for something that does not exist or does not fit
    │   └── PolicyError         a POLICY that cannot be read, or does not fit the model
    ├── CheckpointError         a checkpoint or MODEL file is damaged, or does not match its architecture
    ├── BundleError             a bundle is missing, damaged, too new, or in use
    │   ├── UnfitPartError      an ONNX file is not the part that the manifest tells of (export.bundle)
    │   └── ChangedEngineError  an engine is not the one of its record (engines.engine_files)
    ├── ExportError             a part could not be exported, or its ONNX differs from PyTorch
    ├── CalibrationError        a precision could not be made, or costs more accuracy than allowed
    ├── DataError               images or labels cannot be used
    ├── TrainingError           a training run diverged, or cannot be continued
    │   └── Interrupted         a training run was asked to stop (bdtool.training.stopping)
    └── BackendError            an inference backend is not usable here
        └── EngineError         an engine failed to build or to run
            └── LayoutError     a part has no such activation layout (engines.base)
"""

from typing import ClassVar


class BdtoolError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the command line's exit status."""

    exit_code: ClassVar[int] = 1


class UsageError(BdtoolError):
    """The request itself is wrong: an unknown name, or an option that does not fit the model."""

    exit_code = 2


class PolicyError(UsageError):
    """A POLICY that cannot be parsed, or whose length or values do not fit the model."""


class CheckpointError(BdtoolError):
    """A checkpoint or MODEL file is damaged, unsafe to load, or does not match its architecture."""


class BundleError(BdtoolError):
    """A bundle is missing, incomplete, tampered with, too new, or in use by another process."""


class ExportError(BdtoolError):
    """A part could not be exported, or its ONNX does not compute what PyTorch computes."""


class CalibrationError(BdtoolError):
    """Parts of another precision could not be made from these images, or missed a gate."""


class DataError(BdtoolError):
    """Images or labels are unreadable, empty, or of the wrong shape."""


class TrainingError(BdtoolError):
    """A training run diverged, or its checkpoint does not belong to what is asked."""


class BackendError(BdtoolError):
    """An inference backend, device or precision is not available here."""


class EngineError(BackendError):
    """An engine failed to build, to load or to run."""

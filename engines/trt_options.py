"""What a TensorRT build is asked for, and what its engines are for; known without loading TensorRT."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from bdtool.errors import UsageError
from export.files import json_from_bytes

HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]
_RECIPE = 3  # of `engines.trt_build`: raise it when the same options come to build another engine
TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
ONNXRUNTIME_TENSORRT = "onnxruntime-tensorrt"  # ONNX Runtime with its TensorRT provider
PROFILED = (TENSORRT, TENSORRT_RTX, ONNXRUNTIME_TENSORRT)  # backends whose engines have an optimization profile
_FLAGS = {  # of fields whose option has another name
    "sms": "--sm",
    "optimization_level": "--builder-optimization-level",
    "hardware_compatibility": "--hardware-compatibility-level",
}
_OF_PROVIDER = ("min_batch", "opt_batch", "max_batch", "optimization_level")  # what that provider has options for


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions:
    """Options of one build; fields are named as trtexec names them.

    Args:
        min_batch, opt_batch, max_batch: the optimization profile. The batch is the only dynamic axis of a part, so one
            number says what trtexec's `--minShapes`, `--optShapes` and `--maxShapes` say. Equal ones build static.
        sms: compute capabilities that a TensorRT-RTX engine is for: 89 is 8.9.
        optimization_level: 0 to 5; None takes the library's own, 3.
        hardware_compatibility: lets a TensorRT engine run on other GPUs than the one it was built on, more slowly.
        tf32: let float32 convolutions round their operands to 10 bits of mantissa on tensor cores. TensorRT does so
            unless told otherwise; here fp32 means fp32.
    """

    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 64
    sms: tuple[int, ...] = ()
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    strip_weights: bool = False
    refit: bool = False
    tf32: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise UsageError(
                f"the optimization profile has batch {self.min_batch} (min), {self.opt_batch} (opt), {self.max_batch} "
                "(max); expected 1 <= min <= opt <= max"
            )
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"the builder optimization level is {self.optimization_level}; expected 0 to 5")

    def check_for(self, backend: str) -> None:
        """Raise UsageError where the library `backend` has no such option."""
        if backend == ONNXRUNTIME_TENSORRT and (lacking := self._beyond_provider()):
            raise UsageError(
                f"{', '.join(map(flag_of, lacking))}: ONNX Runtime's TensorRT provider has no such option; it takes "
                f"{', '.join(map(flag_of, _OF_PROVIDER))}. Use --backend {TENSORRT} for others"
            )
        if backend == TENSORRT and self.sms:
            raise UsageError("--sm is for --backend tensorrt-rtx; TensorRT builds for the GPU it runs on (--device)")
        if backend == TENSORRT_RTX and self.hardware_compatibility != "none":
            raise UsageError(
                "TensorRT-RTX has no hardware compatibility levels: its engines run on every architecture of --sm"
            )
        if backend == TENSORRT_RTX and self.version_compatible:
            raise UsageError(
                "TensorRT-RTX has no version-compatible engines (they would need TensorRT's lean runtime); build them "
                "again with the version that runs them"
            )

    def _beyond_provider(self) -> list[str]:
        """Return the names of the fields that are set and that ONNX Runtime's TensorRT provider has no option for."""
        own = (field for field in fields(self) if field.name not in _OF_PROVIDER)
        return [field.name for field in own if getattr(self, field.name) != field.default]

    def nearest_batch(self, n_images: int) -> int:
        """Return the batch inside the optimization profile that is nearest to `n_images`."""
        return max(self.min_batch, min(n_images, self.max_batch))

    @property
    def settings(self) -> str:
        """Everything that changes an engine, as a text to compare; its targets are in the engine's target already."""
        values = asdict(self)
        del values["sms"]
        return json.dumps({"recipe": _RECIPE, **values}, sort_keys=True)


def has_one_batch(backend: str, precision: str) -> bool:
    """Say whether engines of a precision must be built for one batch size.

    TensorRT-RTX 1.7.1 builds INT8 convolutions of a dynamic batch, but then makes no execution context for them; seen
    with a stand-in for the driver, not on a GPU.
    """
    return backend == TENSORRT_RTX and precision in ("int8", "mixed")


def default_max_batch(backend: str, precision: str, bundle_batch: int) -> int:
    """Return the largest batch of engines for which nobody said it: the bundle's, where that can be had."""
    return 1 if has_one_batch(backend, precision) else bundle_batch


def options_from_settings(settings: str) -> TensorRTOptions | None:
    """Return the options of `TensorRTOptions.settings`, but for the targets; None: they are another backend's."""
    values = _values(settings)
    if values.pop("recipe", None) != _RECIPE:
        return None
    try:
        return TensorRTOptions(**values)
    except (UsageError, TypeError):  # a record can hold anything
        return None


def largest_batch(settings: str) -> int | None:
    """Return the largest batch that engines of these settings take; None: any."""
    found: int | None = _setting(settings, "max_batch")
    return found


def smallest_batch(settings: str) -> int:
    """Return the smallest batch that engines of these settings take."""
    found: int | None = _setting(settings, "min_batch")
    return 1 if found is None else found


def is_of_recipe(settings: str) -> bool:
    """Say whether engines of these settings were built as this version builds them: what others built may not run."""
    return _setting(settings, "recipe") in (None, _RECIPE)


def has_host_code(settings: str) -> bool:
    """Say whether engines of these settings bring TensorRT's lean runtime along."""
    return _setting(settings, "version_compatible") is True


def _setting(settings: str, name: str) -> Any:
    """Return one of `TensorRTOptions.settings`; None where another backend's record has its own text, or none."""
    return _values(settings).get(name)


def _values(settings: str) -> dict[str, Any]:
    try:
        values = json_from_bytes(settings)
    except (ValueError, TypeError):  # a record can hold anything
        return {}
    return values if isinstance(values, dict) else {}


def flag_of(field_name: str) -> str:
    """Return the command line's option for a field of `TensorRTOptions`."""
    return _FLAGS.get(field_name, "--" + field_name.replace("_", "-"))


def backends_with(field_name: str) -> tuple[str, ...]:
    """Return the backends that an option other than its default is for; see `TensorRTOptions.check_for`."""
    if field_name in _OF_PROVIDER:
        return PROFILED
    if field_name == "sms":
        return (TENSORRT_RTX,)
    only = ("version_compatible", "hardware_compatibility")
    return (TENSORRT,) if field_name in only else (TENSORRT, TENSORRT_RTX)


def target_name(sms: tuple[int, ...]) -> str:
    """Return for instance "sm86-sm89"; the order in which they were given does not matter."""
    return "-".join(f"sm{sm}" for sm in sorted(set(sms)))

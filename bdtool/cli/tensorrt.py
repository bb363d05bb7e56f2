"""The options of `bdtool build` that only the TensorRT backends have, and what is printed of their engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bdtool.errors import UsageError
from engines.trt_options import (
    PROFILED,
    TensorRTOptions,
    backends_with,
    default_max_batch,
    flag_of,
    has_one_batch,
)

if TYPE_CHECKING:
    from engines.engine_record import EngineRecord

_Command = TypeVar("_Command", bound=Callable[..., Any])
_HARDWARE_COMPATIBILITY = click.Choice(["none", "ampere-plus", "same-compute-capability"])


class SmList(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """Compute capabilities without their dot, as a tuple of ints: "86,89,120"."""

    name = "capabilities"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        words = str(value).lower().replace("sm_", "").replace("sm", "").replace(".", "").split(",")
        if not all(word.strip().isdigit() for word in words):
            self.fail(f"{value!r}: expected compute capabilities separated by commas, for instance 86,89,120")
        return tuple(int(word) for word in words)


def tensorrt_options(command: _Command) -> _Command:
    """Add the options; they arrive as keyword arguments for `tensorrt_options_from`."""
    batch = click.IntRange(min=1)
    options = [
        click.option("--sm", "sms", type=SmList(), metavar="N,...", help="tensorrt-rtx: architectures, as 86,89,120."),
        click.option(
            "--min-batch", type=batch, help="TensorRT's profile: smallest batch (trtexec --minShapes). Default: 1."
        ),
        click.option("--opt-batch", type=batch, help="Batch to be fastest at (trtexec --optShapes). Default: 1."),
        click.option(
            "--max-batch",
            type=batch,
            help="Largest batch (trtexec --maxShapes). Default: the bundle's; 1 for tensorrt-rtx in INT8. 1 builds "
            "static engines.",
        ),
        click.option(
            "--builder-optimization-level",
            "optimization_level",
            type=click.IntRange(0, 5),
            help="TensorRT: how hard to search, 0 to 5. Default: the library's.",
        ),
        click.option("--tf32/--no-tf32", default=None, help="TensorRT: let FP32 convolutions use TF32. Default: no."),
        click.option(
            "--version-compatible", is_flag=True, default=None, help="tensorrt: engines for later versions, too."
        ),
        click.option(
            "--hardware-compatibility-level",
            "hardware_compatibility",
            type=_HARDWARE_COMPATIBILITY,
            help="tensorrt: engines for other GPUs, too, at a cost in speed. Default: none.",
        ),
        click.option("--refit/--no-refit", default=None, help="TensorRT: weights can be exchanged later; needs a GPU."),
        click.option(
            "--strip-weights",
            is_flag=True,
            default=None,
            help="TensorRT: leave the weights out, for a program that refits the engines, as bdtool runs none such; "
            "needs a GPU.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def tensorrt_options_from(
    backend: str, given: dict[str, Any], *, precision: str, bundle_batch: int
) -> TensorRTOptions | None:
    """Return the options for a TensorRT backend, None for another.

    Raises:
        UsageError: an option that does not fit the backend, or an impossible profile.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if backend not in PROFILED:
        if chosen:
            name = next(iter(chosen))
            raise UsageError(f"{flag_of(name)} is for --backend {' or '.join(backends_with(name))}, not {backend}")
        return None
    options = TensorRTOptions(**{"max_batch": default_max_batch(backend, precision, bundle_batch), **chosen})
    options.check_for(backend)
    if has_one_batch(backend, precision) and options.min_batch != options.max_batch:
        raise UsageError(
            f"TensorRT-RTX runs INT8 convolutions of one batch size only; got {options.min_batch} to "
            f"{options.max_batch}. Leave --max-batch out, for images one at a time, or give --min-batch, --opt-batch "
            "and --max-batch alike"
        )
    return options


def details_lines(records: Sequence[EngineRecord]) -> list[str]:
    """Return what the engines' details say, summed up; nothing for backends that give none."""
    details = [record.details for record in records if record.details]
    if not details:
        return []
    lines = [f"convolutions by the type of their operands: {_counts(d['convolutions'] for d in details)}"]
    if all("kernel_types" in d for d in details):
        n_kernels = sum(len(d["kernels"]) for d in details)
        tf32 = "on" if any(d["tf32"] for d in details) else "off"
        lines.append(f"{n_kernels} kernels, writing {_counts(d['kernel_types'] for d in details)}; TF32 {tf32}")
        fixed = [record.part for record in records if record.details and not record.details["capturable"]]
        if fixed:
            lines.append(f"cannot be captured in a CUDA graph: {', '.join(fixed)}")
    return lines


def _counts(several: Any) -> str:
    total: Counter[str] = Counter()
    for counts in several:
        total.update(counts)
    return ", ".join(f"{name} {n}" for name, n in total.most_common()) or "none"

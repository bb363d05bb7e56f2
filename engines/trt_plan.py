"""What a TensorRT-RTX plan holds, read from the program text inside it; no GPU is needed.

TensorRT's own answer, the engine inspector, needs a deserialised engine and so a GPU. A plan holds its program
as text: a header, tensor descriptors, and one line for each kernel. The format is not documented: where nothing of it
is found, as in another version or another library, there is simply no answer.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_PROGRAM = re.compile(
    rb"header \{\n(?P<header>.*?)\n\}.*?\ndescriptors \{\n(?P<tensors>.*?)\n\}\n+main \{\n(?P<main>.*?)\n\}\n", re.S
)
_TENSOR = re.compile(rb'^ *(?:sub_)?tensor=\{.*? name="(?P<name>[^"]+)".* type=(?P<type>\w+)', re.M)
# host steps of a dynamic batch are no kernels; every other step of `main` is one launch
_STEP = re.compile(rb'^ +(?P<operation>\w+)=\{ name="?(?P<name>[^" ]+)(?P<rest>.*)$', re.M)
_HOST_STEPS = frozenset((b"shape_call",))
_OUTPUT = re.compile(rb'\b(?:output|output_args)=\{ ?"(?P<name>[^"]+)"')
_CONVOLUTION = b"corrltn"  # correlation
_FIRST_INPUT = re.compile(rb'\binput=\{ ?"(?P<name>[^"]+)"')
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, and the types of its first output and of what a convolution multiplies ("half", "int8")."""

    name: str
    dtype: str
    multiplies: str | None = None  # None: it is no convolution


@dataclass(frozen=True)
class Plan:
    """A plan's program: its kernels in order, and what its header says."""

    kernels: tuple[Kernel, ...]
    architectures: tuple[str, ...]  # "sm86"
    tf32: bool
    capturable: bool  # all of it can become part of a CUDA graph

    @property
    def dtypes(self) -> dict[str, int]:
        """How many kernels write each type."""
        return dict(Counter(kernel.dtype for kernel in self.kernels))

    @property
    def convolutions(self) -> dict[str, int]:
        """How many convolutions multiply in each type."""
        return dict(Counter(kernel.multiplies for kernel in self.kernels if kernel.multiplies is not None))


def plan_from_bytes(data: bytes) -> Plan | None:
    """Return what a plan holds, or None where its text is not found."""
    # a kernel that is fused at run time carries a small program of its own, as a fallback: those say nothing of capture
    found = [match for match in _PROGRAM.finditer(data) if b"stream_capturable=" in match["header"]]
    if not found:
        return None
    # a plan to refit has one more for each weight, which puts it in order: they have no memory from the caller
    programs = [found[0], *(match for match in found[1:] if b" type=user " in match["header"])]
    headers = [match["header"] for match in programs]
    return Plan(
        kernels=tuple(kernel for match in programs for kernel in _kernels(match["main"], match["tensors"])),
        architectures=tuple(_architectures(headers[0])),
        tf32=any(_flag(header, b"tf32") for header in headers),
        capturable=all(_flag(header, b"stream_capturable") for header in headers),
    )


def _kernels(main: bytes, tensors: bytes) -> list[Kernel]:
    types = {match["name"]: match["type"].decode() for match in _TENSOR.finditer(tensors)}

    def type_of(tensor: re.Match[bytes] | None) -> str:
        return types.get(tensor["name"], _UNKNOWN) if tensor else _UNKNOWN

    return [
        Kernel(
            step["name"].decode(),
            type_of(_OUTPUT.search(step["rest"])),
            type_of(_FIRST_INPUT.search(step["rest"])) if step["operation"] == _CONVOLUTION else None,
        )
        for step in _STEP.finditer(main)
        if step["operation"] not in _HOST_STEPS
    ]


def _architectures(header: bytes) -> list[str]:
    match = re.search(rb"accelerators=\{(?P<names>[^}]*)\}", header)
    return match["names"].decode().split() if match else []


def _flag(header: bytes, name: bytes) -> bool:
    match = re.search(rb"^ *" + name + rb"=(\d+)$", header, re.M)
    return match is not None and int(match[1]) != 0

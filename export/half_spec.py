"""What FP16 parts look like from outside; `export.half` makes them. Loads no ONNX."""

from __future__ import annotations

from dataclasses import replace

from bdtool.specs import NetworkSpec, PartSpec, TensorSpec

HALF_VERSION = "1"  # of what `export.half` writes: engines built from an older conversion are built again


def half_network(network: NetworkSpec) -> NetworkSpec:
    """Return the network with float16 activations between its parts; images and results stay float32."""
    return replace(network, parts=tuple(half_part(part) for part in network.parts))


def half_part(part: PartSpec) -> PartSpec:
    """Return the spec of `part` in FP16; one that is so already stays as it is."""

    def typed(activation: str, tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, dtype="float16") if activation == "x" else tensor

    return replace(
        part,
        inputs=tuple(typed(a, t) for a, t in zip(part.reads, part.inputs, strict=True)),
        outputs=tuple(typed(a, t) for a, t in zip(part.writes, part.outputs, strict=True)),
    )

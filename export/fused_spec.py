"""What a fused model reads and writes; `export.fused` makes them. Loads no ONNX."""

from bdtool.specs import NetworkSpec, PartSpec, TensorSpec

FORCE_KEEP, FORCE_DROP = 1, 2


def fused_spec(network: NetworkSpec) -> PartSpec:
    """Return the fused model as a part. Its FLOPs depend on the image and are 0 here."""
    stem, head = network.require("stem"), network.require("head")
    return PartSpec(
        name="fused",
        kind="full",
        reads=("image", "force"),
        writes=("logits", "keep"),
        inputs=(_for_one(stem.inputs[0]), TensorSpec(name="force", shape=(network.n_blocks,), dtype="uint8")),
        outputs=(_for_one(head.outputs[0]), TensorSpec(name="keep", shape=(network.n_blocks,), dtype="bool")),
        flops=0,
    )


def _for_one(tensor: TensorSpec) -> TensorSpec:
    return TensorSpec(name=tensor.name, shape=tensor.shape_for(1), dtype=tensor.dtype)

"""What is known of FP16 and BF16 parts without loading ONNX; `export.half` makes them."""

HALF_VERSION = "1"  # of what `export.half` writes: engines built from an older conversion are built again
HALF_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # of the activations between parts

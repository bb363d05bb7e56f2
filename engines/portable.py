"""Parts in the forms that runtimes other than ours are fast with, for files that leave the bundle.

Integers: TensorRT wants Q/DQ with symmetric int8 activations, as `calibrate` writes them. ONNX Runtime's CPU provider
computes such a file in floats, slower than an FP32 one (`benchmarks/files.py`); in the form of `engines.integer_cpu` it
takes integers, and which weights are fast or safe there depends on the processor.
"""

from __future__ import annotations

from typing import Literal

import onnx

from bdtool.specs import PartSpec
from engines.base import PLAIN_LAYOUT
from engines.check import check_engine
from engines.integer_cpu import is_quantized, lower_quantized
from engines.layouts import INTEGER_LAYOUT, feature_maps
from engines.onnxrt import OnnxRuntimeBackend
from engines.selections import convolve_shortcuts

IntegerForm = Literal["cpu", "cpu-without-vnni", "tensorrt"]


def portable_part(part: PartSpec, model: bytes, form: IntegerForm) -> tuple[bytes, float]:
    """Return a part's ONNX model for a file, and its worst error beside the part, over the output's range.

    In floats a shortcut without weights is a convolution, in whatever form.

    Args:
        form: of integers. "tensorrt": as they are. "cpu": for ONNX Runtime's CPU provider on x86 processors with VNNI,
            and on ARM. "cpu-without-vnni": for others, whose 16-bit sums would saturate.

    Raises:
        EngineError: it computes something else than the part.
    """
    proto = onnx.ModelProto.FromString(model)
    before = proto.SerializeToString(deterministic=True)
    if not is_quantized(proto):
        convolve_shortcuts(proto)
    elif form != "tensorrt":
        lower_quantized(proto, unsigned_weights=form == "cpu-without-vnni")
    data = proto.SerializeToString(deterministic=True)
    if data == before:
        return model, 0.0
    layout = INTEGER_LAYOUT if {tensor.dtype for tensor in feature_maps(part)} == {"int8"} else PLAIN_LAYOUT
    return data, check_engine(part, model, OnnxRuntimeBackend().load(part, data, layout=layout))

"""INT8 parts in the forms that runtimes other than ours run in integers, for files that leave the bundle.

TensorRT wants Q/DQ with symmetric int8 activations, as `calibrate` writes them. ONNX Runtime's CPU provider computes
such a file in floats, slower than an FP32 one (`benchmarks/files.py`); in the form of `engines.integer_cpu` it takes
integers, and which weights are fast or safe there depends on the processor.
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

IntegerForm = Literal["cpu", "cpu-without-vnni", "tensorrt"]


def part_in_form(part: PartSpec, model: bytes, form: IntegerForm) -> tuple[bytes, float]:
    """Return a part's ONNX model in a form, and its worst error beside the part, over the output's range.

    A part without Q/DQ stays as it is.

    Args:
        form: "tensorrt": as it is. "cpu": for ONNX Runtime's CPU provider on x86 processors with VNNI, and on ARM.
            "cpu-without-vnni": for others, whose 16-bit sums would saturate.

    Raises:
        EngineError: it computes something else than the part.
    """
    proto = onnx.ModelProto.FromString(model)
    if form == "tensorrt" or not is_quantized(proto):
        return model, 0.0
    lower_quantized(proto, unsigned_weights=form == "cpu-without-vnni")
    data = proto.SerializeToString(deterministic=True)
    layout = INTEGER_LAYOUT if {tensor.dtype for tensor in feature_maps(part)} == {"int8"} else PLAIN_LAYOUT
    return data, check_engine(part, model, OnnxRuntimeBackend().load(part, data, layout=layout))

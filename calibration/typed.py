"""FP16 and BF16 parts: the PyTorch modules cast, then exported. No builder needs a precision flag for them."""

from __future__ import annotations

import torch
from torch import nn

from bdtool.specs import PartSpec
from export.onnx_model import BFLOAT16_OPSET, OPSET, OnnxExporter, fold_batch_norm

TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ACTIVATION_TYPES = {"fp16": "float16", "bf16": "bfloat16"}


class TypedExporter:
    """Exports modules in "fp16" or "bf16"; batch-norm is folded before the weights lose digits."""

    def __init__(self, precision: str) -> None:
        self._dtype = TORCH_TYPES[precision]
        self._exporter = OnnxExporter(opset=BFLOAT16_OPSET if precision == "bf16" else OPSET)

    def onnx_from_module(self, module: nn.Module, part: PartSpec) -> bytes:
        """Return the part's model, which computes in the precision and whose tensors have the dtypes that `part` says.

        The head computes in float32: its sums over all pixels would lose digits, and its logits are float32 anyway.
        """
        compute = torch.float32 if part.kind == "head" else self._dtype
        result: torch.dtype = getattr(torch, part.outputs[0].dtype)
        folded = fold_batch_norm(module).to(compute)
        return self._exporter.onnx_from_module(torch.fx.symbolic_trace(_Typed(folded, compute, result)), part)


class _Typed(nn.Module):
    def __init__(self, module: nn.Module, compute: torch.dtype, result: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._compute, self._result = compute, result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.module(x.to(self._compute)).to(self._result)
        return y

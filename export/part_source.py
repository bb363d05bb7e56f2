"""Where the ONNX parts of one precision come from: the bundle, or its FP32 parts, converted as they are asked for."""

from __future__ import annotations

from functools import cached_property

from bdtool.specs import NetworkSpec, PartSpec
from export.bundle import Bundle
from export.half_spec import HALF_DTYPES, HALF_VERSION
from export.manifest import EXPORTED


class PartSource:
    """The ONNX parts that engines of one precision are built from; calibrated ones go before converted ones.

    Args:
        converts_fp16: make FP16 parts from the FP32 ones where the bundle has none.

    Attributes:
        converted: whether the parts are made from the FP32 ones.
        stored: the precision of the files that they are read from.

    Raises:
        BundleError: the bundle has no parts of that precision, and they cannot be made.
        UsageError: there is no such precision.
    """

    def __init__(self, bundle: Bundle, precision: str, *, converts_fp16: bool = False) -> None:
        self.converted = precision == "fp16" and converts_fp16 and not bundle.has_precision(precision)
        if not self.converted:
            bundle.require_precision(precision)
        self.precision = precision
        self._bundle = bundle
        self.stored = EXPORTED if self.converted else precision

    @cached_property
    def network(self) -> NetworkSpec:
        """The bundle's network, with the dtypes that its activations have in this precision."""
        if self.converted:
            return self._bundle.network.with_activation(HALF_DTYPES[self.precision])
        return self._bundle.network_at(self.precision)

    def model(self, part: PartSpec) -> bytes:
        """Return a part's ONNX model, made from a file whose digest is that of the manifest.

        Raises:
            BundleError: the file differs from its digest, or cannot be read.
            ExportError: it cannot be converted.
        """
        model = self._bundle.part_bytes(part, self.stored)
        if not self.converted:
            return model
        from export.half import half_from_fp32  # loads onnx, which a build with nothing to do can spare

        return half_from_fp32(model, self._bundle.network.part(part.name), self.precision)

    def holds(self, part: PartSpec) -> bool:
        """Say whether there is a file to make the part's model from."""
        return self._bundle.holds(part, self.stored)

    def key(self, part: PartSpec) -> str:
        """Return a text that is equal for equal models: the digest of the file, and the version of the conversion."""
        converter = f"+half{HALF_VERSION}" if self.converted else ""
        return self._bundle.part_sha256(part, self.stored) + converter

"""What engines are compared with: the MODEL in a bundle, run by PyTorch, or else the bundle's own ONNX parts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from bdtool.errors import BundleError
from bdtool.verification.onnx_classifier import OnnxClassifier
from export.bundle import Bundle
from export.manifest import EXPORTED
from export.part_source import PartSource

if TYPE_CHECKING:
    from bdtool.models.model import BlockDropModel
    from bdtool.torch_classifier import TorchClassifier

    Oracle = TorchClassifier | OnnxClassifier


def why_no_pytorch(bundle: Bundle) -> str | None:
    """Return why a bundle cannot be compared with PyTorch, if so."""
    if bundle.manifest.weights_file in bundle.manifest.left_out:
        return "`bdtool pack` left out the weights"
    return None if find_spec("torch") else "PyTorch is not installed"


def model_in(bundle: Bundle) -> BlockDropModel | None:
    """Load the MODEL of a bundle; None where it cannot be compared with PyTorch.

    Raises:
        CheckpointError: the weights cannot be loaded.
    """
    if why_no_pytorch(bundle):
        return None
    from bdtool.models.store import load_model

    return load_model(bundle.weights_path)


def oracle_for(bundle: Bundle, source: PartSource, model: BlockDropModel | None) -> Oracle:
    """Return what engines made from `source` are compared with: `model`, or the ONNX parts where that is None.

    Raises:
        BundleError: neither is there.
    """
    network = bundle.network
    if model is None:
        return OnnxClassifier(network, _reference_parts(bundle, source), max_batch=network.bulk_batch)
    from bdtool.torch_classifier import TorchClassifier

    return TorchClassifier(model, max_batch=network.bulk_batch, threshold=network.threshold)


def is_own(oracle: Oracle, source: PartSource) -> bool:
    """Say whether the oracle runs the very parts of `source`, so that comparing these with it says nothing."""
    return isinstance(oracle, OnnxClassifier) and oracle.precision == source.precision


def _reference_parts(bundle: Bundle, source: PartSource) -> PartSource:
    """Return the exported parts, where all are there, else `source`."""
    chain = [part for part in bundle.network.parts if part.kind != "full"]
    if not all(source.holds(part) for part in chain):
        raise BundleError(
            f"{bundle.path} has engines in place of {source.precision} ONNX parts, so there is nothing to compare them "
            "with. Verify the bundle that it was packed from; `bdtool build` with this --backend and --precision "
            "compares the engines with the digests in their records"
        )
    exported = PartSource(bundle, EXPORTED) if bundle.has_precision(EXPORTED) else source
    return exported if all(exported.holds(part) for part in chain) else source

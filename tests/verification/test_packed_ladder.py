"""Bundles without weights, and machines without PyTorch: the ladder compares engines with the bundle's ONNX parts."""

import json
import shutil
import sys

import numpy as np
import pytest

from bdtool.data.sources import open_data
from bdtool.data.synthetic import synthetic_images
from bdtool.errors import BundleError
from bdtool.packing import pack
from bdtool.runtime.place import Place
from bdtool.torch_classifier import TorchClassifier
from bdtool.verification.ladder import verify
from bdtool.verification.onnx_classifier import OnnxClassifier
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle
from export.files import sha256_of_file
from export.part_source import PartSource

_LEFT_OUT = "not compared: `bdtool pack` left out the weights"


def _rungs(path, place=None):
    bundle = Bundle.open(path)
    result = verify(bundle, open_data("synthetic:12", network=bundle.network), place or Place())
    assert result.oracle == "ONNX"
    return {rung.name: rung for rung in result.rungs}


def _packed(whole, target, **options):
    pack(Bundle.open(whole), target, **options)
    return target


def _failed(rungs):
    return [name for name, rung in rungs.items() if not rung.ok]


def _not_compared(rungs):
    return {name: rung.detail for name, rung in rungs.items() if rung.worst is None}


def test_onnx_parts_one_by_one_are_the_masked_forward(tiny):
    bundle, images = Bundle.open(tiny.bundle), synthetic_images(5, height=32, width=32)
    torch = TorchClassifier(tiny.model)
    onnx = OnnxClassifier(bundle.network, PartSource(bundle, "fp32"), max_batch=2)
    np.testing.assert_allclose(onnx.keep_probability(images), torch.keep_probability(images), atol=1e-5)
    np.testing.assert_array_equal(onnx.decide(images), torch.decide(images))
    keep = np.random.default_rng(0).random((5, bundle.network.n_blocks)) < 0.5
    result = onnx.run(images, keep)
    np.testing.assert_allclose(result.logits, torch.run(images, keep).logits, atol=1e-4)
    np.testing.assert_array_equal(result.policy, keep)


@pytest.mark.parametrize("with_full", [False, True])
def test_packed_bundle_passes_what_can_be_compared(tiny, tmp_path, with_full):
    rungs = _rungs(_packed(tiny.bundle, tmp_path / "packed", with_full=with_full))
    assert list(rungs) == ["digests", "manifest", "onnx", "engines", "policy", "logits", "top1"]
    assert not _failed(rungs)
    assert _not_compared(rungs) == {"manifest": _LEFT_OUT, "onnx": _LEFT_OUT}
    assert rungs["engines"].detail.startswith(f"{8 + with_full} parts, ")
    assert rungs["top1"].detail == "0 of 60 predictions differ"


def test_half_parts_that_a_backend_makes_are_compared_with_their_fp32_ones(tiny, tmp_path):
    rungs = _rungs(_packed(tiny.bundle, tmp_path / "packed"), Place(backend="torch", precision="fp16"))
    assert not _failed(rungs)
    assert rungs["onnx"].worst > 1e-5


def test_machine_without_pytorch_says_so(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    rungs = _rungs(tiny.bundle)
    assert not _failed(rungs)
    why = "not compared: PyTorch is not installed"
    assert _not_compared(rungs) == {"manifest": why, "onnx": why}
    assert rungs["engines"].detail.startswith("9 parts, ")


def test_engine_of_another_block_is_found(export_random, tmp_path):
    deeper = export_random("resnet14", shortcut="average-pool")
    packed = _packed(deeper.bundle, tmp_path / "packed")
    assert not _failed(_rungs(packed))  # builds the engines
    [directory] = (packed / "engines").iterdir()
    shutil.copy(directory / "block_00.onnx", directory / "block_01.onnx")
    record = json.loads((directory / "block_01.engine.json").read_text())
    record["sha256"] = sha256_of_file(directory / "block_01.onnx")
    (directory / "block_01.engine.json").write_text(json.dumps(record))
    rungs = _rungs(packed)
    assert {"engines", "logits"} <= set(_failed(rungs))
    assert "worst block_01" in rungs["engines"].detail


def test_damaged_part_ends_the_ladder(tiny, tmp_path):
    packed = _packed(tiny.bundle, tmp_path / "packed")
    bundle = Bundle.open(packed, check_digests=False)
    (packed / "onnx" / "head.onnx").write_bytes(b"other")
    result = verify(bundle, open_data("synthetic:12", network=bundle.network), Place())
    assert [(rung.name, rung.ok) for rung in result.rungs] == [("digests", False)]
    assert result.to_json()["oracle"] == "ONNX"


def test_engines_without_parts_have_nothing_to_be_compared_with(bundle_copy, tmp_path):
    EngineStore(Bundle.open(bundle_copy), identify_backend("onnxruntime", "cpu")).build(
        lambda: open_backend("onnxruntime", "cpu")
    )
    packed = _packed(bundle_copy, tmp_path / "packed", engines="onnxruntime")
    with pytest.raises(BundleError, match=r"engines in place of fp32 ONNX parts.* nothing to .* `bdtool build`"):
        _rungs(packed)

"""The parity ladder finds damage on the rung where it belongs, and says so without stopping half-way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bdtool.data.sources import open_data
from bdtool.errors import BackendError, BundleError
from bdtool.runtime.place import Place
from bdtool.verification import Verification, verify
from export.bundle import Bundle
from export.files import sha256_of_file

CPU = Place()
RUNGS = ["digests", "onnx", "engines", "policy", "logits", "top1"]


def _verify(path: Path, place: Place = CPU, **options: Any) -> Verification:
    bundle = Bundle.open(path)
    return verify(bundle, open_data("synthetic:12", network=bundle.network), place, **options)


def _failed(result: Verification) -> list[str]:
    return [rung.name for rung in result.rungs if not rung.ok]


def _rung(result: Verification, name: str) -> Any:
    return next(rung for rung in result.rungs if rung.name == name)


@pytest.fixture
def deeper_copy(export_random: Any, tmp_path: Path) -> Path:
    """A bundle with two blocks in each stage, so that two engines have the same shapes."""
    deeper = export_random("resnet14", shortcut="average-pool")
    return Path(shutil.copytree(deeper.bundle, tmp_path / "deeper", ignore=shutil.ignore_patterns("engines")))


def _put_engine(bundle: Path, source: str, target: str) -> None:
    """Put one part's engine in the place of another's, its record to match."""
    _verify(bundle)  # builds the engines
    [directory] = (bundle / "engines").iterdir()
    shutil.copy(directory / f"{source}.onnx", directory / f"{target}.onnx")
    record = json.loads((directory / f"{target}.engine.json").read_text())
    record["sha256"] = sha256_of_file(directory / f"{target}.onnx")
    (directory / f"{target}.engine.json").write_text(json.dumps(record))


def _edit_manifest(bundle: Path, **changes: Any) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**data, **changes}))


def test_whole_bundle_passes_every_rung_in_order(tiny: Any) -> None:
    seen: list[str] = []
    result = _verify(tiny.bundle, on_rung=lambda rung: seen.append(rung.name))
    assert result.ok
    assert [rung.name for rung in result.rungs] == seen == RUNGS
    assert result.n_images == 12
    assert "all, random:1:0, learned" in _rung(result, "logits").detail


def test_policy_network_with_a_hidden_layer_passes_every_rung(export_random: Any) -> None:
    hidden = export_random("resnet8", shortcut="average-pool", policy_hidden=16)
    assert hidden.model.policy.hidden.out_features == 16
    assert _verify(hidden.bundle).ok


def test_limit_is_kept(tiny: Any) -> None:
    assert _verify(tiny.bundle, limit=5).n_images == 5


def test_bundle_without_policy_network_has_nothing_to_compare_there(export_random: Any) -> None:
    result = _verify(export_random("resnet8", shortcut="average-pool", has_policy=False).bundle)
    assert result.ok
    assert _rung(result, "policy").worst is None


def test_engine_of_another_block_fails_the_engines_rung(deeper_copy: Path) -> None:
    _put_engine(deeper_copy, "block_00", "block_01")
    result = _verify(deeper_copy)
    assert {"engines", "logits"} <= set(_failed(result))
    assert not {"digests", "onnx", "policy"} & set(_failed(result))
    assert "worst block_01" in _rung(result, "engines").detail


def test_engine_of_another_shape_fails_its_rungs_and_ends_nothing(deeper_copy: Path) -> None:
    _put_engine(deeper_copy, "block_00", "block_05")
    result = _verify(deeper_copy)
    assert [rung.name for rung in result.rungs] == RUNGS
    assert _failed(result) == ["engines", "logits", "top1"]
    assert "part 'block_05': ONNX Runtime failed to run it" in _rung(result, "logits").detail
    json.dumps(result.to_json(), allow_nan=False)


def test_damaged_engine_makes_the_command_fail(deeper_copy: Path) -> None:
    from click.testing import CliRunner

    from bdtool.cli import main

    _put_engine(deeper_copy, "block_00", "block_01")
    result = CliRunner().invoke(main, ["verify", str(deeper_copy), "--json", "-"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["rungs"]["engines"]["ok"] is False
    text = CliRunner().invoke(main, ["verify", str(deeper_copy)]).stdout
    assert "engines  FAILED" in text


def test_flipped_policy_bits_are_no_error_of_the_logits(bundle_copy: Path) -> None:
    _edit_manifest(bundle_copy, threshold=0.9)  # the engines now drop what PyTorch keeps
    result = _verify(bundle_copy)
    assert _failed(result) == ["policy"]
    rung = _rung(result, "policy")
    assert rung.worst == pytest.approx(int(rung.detail.split()[0]) / (12 * 3))
    assert "of 36 keep bits differ, PyTorch's probability up to 0." in rung.detail


def test_other_preprocessing_than_the_weights_shows_above_the_engines(bundle_copy: Path) -> None:
    preprocessing = json.loads((bundle_copy / "manifest.json").read_text())["preprocessing"]
    _edit_manifest(bundle_copy, preprocessing={**preprocessing, "mean": [0.0, 0.0, 0.0]})
    failed = _failed(_verify(bundle_copy))
    assert "logits" in failed
    assert not {"onnx", "engines"} & set(failed)


def test_weights_that_are_not_those_of_the_parts_fail_the_onnx_rung(bundle_copy: Path) -> None:
    from safetensors import safe_open

    path = bundle_copy / "weights.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["base.blocks.1.conv1.weight"] *= 1.01
    save_file(tensors, path, metadata=metadata)
    _edit_manifest(bundle_copy, weights={"file": path.name, "sha256": sha256_of_file(path)})
    result = _verify(bundle_copy)
    assert {"onnx", "logits"} <= set(_failed(result))
    assert "engines" not in _failed(result)


def test_weights_of_another_network_are_refused(bundle_copy: Path, export_random: Any) -> None:
    path = bundle_copy / "weights.safetensors"
    shutil.copy(export_random("resnet14", shortcut="average-pool").path, path)
    _edit_manifest(bundle_copy, weights={"file": path.name, "sha256": sha256_of_file(path)})
    with pytest.raises(BundleError, match=r"its weights are those of a resnet14 .* a resnet8. Export the model again"):
        _verify(bundle_copy)


def test_nan_passes_no_rung(tiny: Any) -> None:
    rung = replace(_verify(tiny.bundle).rungs[4], worst=float("nan"))
    assert not rung.ok


def test_unusable_device_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="device 'cuda:0'"):
        _verify(tiny.bundle, Place(device="cuda:0"))

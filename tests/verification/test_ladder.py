"""The parity ladder finds damage on the rung where it belongs, and says so without stopping half-way."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bdtool.data.sources import open_data
from bdtool.errors import BackendError, BundleError
from bdtool.models.state import model_from_state
from bdtool.models.store import save_model
from bdtool.pipeline import export_model
from bdtool.runtime import one_call, paths
from bdtool.runtime.place import Place
from bdtool.verification import ladder
from bdtool.verification.ladder import Verification, verify
from engines.onnxrt import OnnxRuntimeBackend
from export.bundle import Bundle
from export.files import sha256_of_file
from export.manifest import Variant, read_manifest, write_manifest

CPU = Place()
RUNGS = ["digests", "manifest", "onnx", "engines", "policy", "logits", "top1"]


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


def _put_engine(bundle: Path, source: str, target: str, place: Place = CPU) -> None:
    """Put one part's engine in the place of another's, its record to match."""
    _verify(bundle, place)  # builds the engines
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
    assert _rung(result, "top1").detail == "0 of 60 predictions differ"  # policies by strategies: 3 x 12, 2 x 3 x 4


def test_mask_that_a_base_was_trained_for_is_compared(export_random: Any, tmp_path: Path) -> None:
    bundle = shutil.copytree(export_random("resnet8", has_policy=False, mask="101").bundle, tmp_path / "bundle")
    result = _verify(bundle)
    assert result.ok
    assert "all, random:1:0, 101" in _rung(result, "logits").detail
    _edit_manifest(bundle, policy="110")
    result = _verify(bundle)
    assert _failed(result) == ["manifest"]
    assert "mask is '110', the MODEL says '101'" in _rung(result, "manifest").detail


def test_policy_network_with_a_hidden_layer_passes_every_rung(export_random: Any) -> None:
    hidden = export_random("resnet8", shortcut="average-pool", policy_hidden=16)
    assert hidden.model.policy.hidden.out_features == 16
    assert _verify(hidden.bundle).ok


def test_networks_that_scale_images_down_pass_every_rung(export_random: Any) -> None:
    exported = export_random("resnet8", shortcut="average-pool", downscale=2, policy_downscale=4)
    assert _verify(exported.bundle).ok


def test_limit_is_kept(tiny: Any) -> None:
    result = _verify(tiny.bundle, limit=5)
    assert result.n_images == 5
    assert result.input_source.endswith(", drawn from 12 images with seed 0")


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
    assert re.search(r"engines +FAILED", text)


def _change_weights(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the MODEL in a bundle, its digests to match: the parts are still those of the one before."""
    path = bundle / "weights.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    _put_weights(bundle, path)


def _put_weights(bundle: Path, source: Path) -> None:
    path = bundle / "weights.safetensors"
    path.write_bytes(source.read_bytes())
    digest = sha256_of_file(path)
    provenance = json.loads((bundle / "manifest.json").read_text())["provenance"]
    _edit_manifest(
        bundle, weights={"file": path.name, "sha256": digest}, provenance={**provenance, "model_sha256": digest}
    )


def test_flipped_policy_bits_are_no_error_of_the_logits(bundle_copy: Path) -> None:
    _change_weights(bundle_copy, lambda tensors: tensors["policy.logit.bias"].add_(0.5))
    result = _verify(bundle_copy)
    assert _failed(result) == ["onnx", "policy"]
    assert "worst policy" in _rung(result, "onnx").detail
    rung = _rung(result, "policy")
    assert rung.worst == pytest.approx(int(rung.detail.split()[0]) / (12 * 3))
    assert "of 36 keep bits differ, PyTorch's probability up to 0." in rung.detail


def test_weights_that_are_not_those_of_the_parts_fail_the_onnx_rung(bundle_copy: Path) -> None:
    _change_weights(bundle_copy, lambda tensors: tensors["base.blocks.1.conv1.weight"].mul_(1.01))
    result = _verify(bundle_copy)
    assert {"onnx", "logits"} <= set(_failed(result))
    assert "engines" not in _failed(result)


def test_weights_of_another_network_fail_the_manifest_rung(bundle_copy: Path, export_random: Any) -> None:
    _put_weights(bundle_copy, export_random("resnet14", shortcut="average-pool").path)
    rung = _verify(bundle_copy).rungs[-1]
    assert (rung.name, rung.ok) == ("manifest", False)
    assert "arch is 'resnet8', the MODEL says 'resnet14'" in rung.detail


def _part(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(part for part in data["parts"] if part["name"] == name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(arch="resnet999"), "arch is 'resnet999', the MODEL says 'resnet8'"),
        (
            lambda data: data.update(labels=list("abcdefghij")),
            r"labels is \['a', 'b', 'c', .*\], the MODEL says None: the",
        ),
        (lambda data: data.update(threshold=0.4999), "threshold is 0.4999, the MODEL says 0.5: the manifest was"),
        (
            lambda data: data["preprocessing"].update(resize=36),
            "preprocessing.resize is 36, the MODEL says None: the manifest was changed. Export the model again",
        ),
        (
            lambda data: data["preprocessing"].update(mean=[0, 0, 0]),
            r"preprocessing.mean\[0\] is 0.0, the MODEL says 0.5",
        ),
        (lambda data: _part(data, "block_01").update(flops=7), "parts.block_01.flops is 7, the MODEL says [0-9]+"),
        (lambda data: _part(data, "full").update(flops=7), "parts.full.flops is 7, the MODEL says [0-9]+"),
        (
            lambda data: data["parts"].insert(0, data["parts"].pop()),
            r"order of parts\[0\] is 'full', the MODEL says 'policy' \(9 of 9 differ\)",
        ),
        (
            lambda data: data["provenance"].update(created_by="me"),
            "provenance.created_by is 'me', the MODEL says 'test'",
        ),
        (lambda data: data["provenance"].update(epochs=3), "provenance.epochs is 3, the MODEL says absent"),
        (lambda data: data["provenance"].update(model_sha256="0"), "provenance.model_sha256 is '0', the MODEL says"),
        (
            lambda data: _part(data, "stem").update(precision="int8"),
            "parts.stem.precision is 'int8', export writes 'fp32'",
        ),
        (lambda data: _part(data, "stem").update(error=0.1), "parts.stem.error is 0.1 of allowed 1e-05, export allows"),
        (lambda data: _part(data, "stem").update(tolerance=1), "of allowed 1, export allows 1e-05"),
    ],
)
def test_manifest_that_says_other_than_the_model_fails_its_rung(
    bundle_copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = json.loads((bundle_copy / "manifest.json").read_text())
    change(data)
    (bundle_copy / "manifest.json").write_text(json.dumps(data))
    result = _verify(bundle_copy)
    assert [rung.name for rung in result.rungs] == ["digests", "manifest"]  # nothing else is compared
    assert _failed(result) == ["manifest"]
    assert re.search(message, result.rungs[-1].detail)


def test_labels_in_another_order_fail_the_manifest_rung(bundle_copy: Path, tiny: Any, tmp_path: Path) -> None:
    spec = replace(tiny.model.spec, labels=tuple("abcdefghij"))
    labelled = model_from_state(spec, tiny.model.state_dict())
    save_model(labelled, tmp_path / "labelled.safetensors")
    _put_weights(bundle_copy, tmp_path / "labelled.safetensors")
    _edit_manifest(bundle_copy, labels=list("jihgfedcba"))
    assert (
        "labels[0] is 'j', the MODEL says 'a' (10 of 10 differ): the manifest was changed"
        in _verify(bundle_copy).rungs[-1].detail
    )
    _edit_manifest(bundle_copy, labels=list("abcdefghij"))
    assert _verify(bundle_copy).ok


def test_all_strategies_of_the_backend_are_compared(tiny: Any) -> None:
    assert "strategies chain, path, fused; worst" in _rung(_verify(tiny.bundle), "logits").detail


def test_path_engine_of_other_parts_fails_the_logits_rung(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = paths.parts_of_path
    monkeypatch.setattr(paths, "parts_of_path", lambda network, mask: real(network, ~mask))
    result = _verify(tiny.bundle)
    assert "logits" in _failed(result)
    assert not {"onnx", "engines", "policy"} & set(_failed(result))
    assert _rung(result, "logits").detail.endswith("by path")


def test_fused_engine_that_runs_other_blocks_fails_the_logits_rung(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = one_call.Force.give
    monkeypatch.setattr(one_call.Force, "give", lambda force, keep: real(force, None if keep is None else ~keep))
    rung = _rung(_verify(tiny.bundle), "logits")
    assert not rung.ok
    assert rung.detail.endswith("by fused")


def test_fused_engine_that_decides_otherwise_fails_the_logits_rung(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxRuntimeBackend.fuse
    monkeypatch.setattr(
        OnnxRuntimeBackend, "fuse", lambda self, network, files: real(self, replace(network, threshold=0.9), files)
    )
    result = _verify(tiny.bundle)
    rung = _rung(result, "logits")
    assert (rung.worst, rung.ok) == (math.inf, False)
    assert rung.detail.endswith("worst learned by fused")
    json.dumps(result.to_json(), allow_nan=False)


def test_few_images_are_spread_over_the_sample(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_data("synthetic:12", network=Bundle.open(tiny.bundle).network)
    spread = source.images_at([0, 4, 7, 11])
    seen = []
    compare_part, answers_of = ladder.compare_part, ladder.answers_of
    monkeypatch.setattr(ladder, "compare_part", lambda *given: seen.append(given[2]) or compare_part(*given))
    monkeypatch.setattr(ladder, "answers_of", lambda *given: seen.append(given[3]) or answers_of(*given))
    assert _verify(tiny.bundle).ok
    assert len(seen) > 2
    assert all(np.array_equal(images, spread) for images in seen)


def test_large_logits_may_differ_by_more(random_model: Any, shared_traces: None, tmp_path: Path) -> None:
    """As those of a classifier on cosines: each float32 sum has its own last digit."""
    model = random_model("resnet8", shortcut="average-pool")
    with torch.no_grad():
        for weight in model.base.head.parameters():
            weight *= 1e5
    save_model(model, tmp_path / "large.safetensors")
    export_model(tmp_path / "large.safetensors", tmp_path / "bundle")
    result = _verify(tmp_path / "bundle")
    assert result.ok, _failed(result)
    assert _rung(result, "logits").worst > ladder.LOGITS_TOLERANCE


GATES = {"max_accuracy_drop": 0.5}


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"policy": "all"},
        {"policy": "all", "gates": None},
        {"policy": "all", "gates": {"max_accuracy_drop": "little"}},
        {"policy": 5, "gates": GATES},
    ],
)
def test_record_of_a_calibration_that_was_changed_is_named(bundle_copy: Path, record: dict[str, Any]) -> None:
    manifest = read_manifest(bundle_copy)
    variant = Variant(activation="int8", files=manifest.files, calibration=record)
    write_manifest(bundle_copy, replace(manifest, variants={"int8": variant}))
    with pytest.raises(BundleError, match=r"the int8 calibration was changed .* bdtool calibrate --precision"):
        _verify(bundle_copy, Place(precision="int8"))


def test_nan_passes_no_rung(tiny: Any) -> None:
    rung = replace(_verify(tiny.bundle).rungs[5], worst=float("nan"))
    assert not rung.ok


def test_unusable_device_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="device 'cuda:0'"):
        _verify(tiny.bundle, Place(device="cuda:0"))


TORCH_HALF = Place(backend="torch", precision="fp16")  # its FP16 parts are made from the bundle's FP32 ones


def test_half_engines_that_the_backend_makes_pass_every_rung(tiny: Any) -> None:
    result = _verify(tiny.bundle, TORCH_HALF)
    assert result.ok
    assert [rung.name for rung in result.rungs] == [*RUNGS, "accuracy"]
    bounds = {_rung(result, name).bound for name in ("onnx", "engines")}
    assert bounds <= {1e-5, 1e-4, 0.01}  # the processor says which part is nearest to its bound
    assert _rung(result, "logits").worst > 1e-5  # further from PyTorch than FP32 parts may be
    assert (_rung(result, "policy").worst, _rung(result, "policy").bound) == (0, 0)
    assert _rung(result, "logits").detail.startswith("policy learned; ")
    assert "strategies chain, path" in _rung(result, "logits").detail


def test_half_engines_without_policy_network_are_compared_with_every_block(export_random: Any) -> None:
    result = _verify(export_random("resnet8", shortcut="average-pool", has_policy=False).bundle, TORCH_HALF)
    assert result.ok
    assert _rung(result, "policy").worst is None
    assert _rung(result, "top1").detail.startswith("policy all; ")


def test_damaged_half_engine_fails_the_engines_rung(deeper_copy: Path) -> None:
    _put_engine(deeper_copy, "block_00", "block_01", TORCH_HALF)
    result = _verify(deeper_copy, TORCH_HALF)
    assert "engines" in _failed(result)
    assert not {"onnx", "policy"} & set(_failed(result))
    assert "worst block_01" in _rung(result, "engines").detail


def test_precision_that_nobody_makes_is_refused(tiny: Any) -> None:
    for place in (Place(precision="fp16"), Place(backend="torch", precision="int8")):
        with pytest.raises(
            BundleError, match=f"has no {place.precision} parts; it has fp32.* or make them: bdtool cal"
        ):
            _verify(tiny.bundle, place)

"""`bdtool pack`: a bundle with what a deployment needs."""

import json
import sys


def test_packed_int8_runs_and_says_what_it_lacks(
    calibrate, bdtool, bdtool_json, bundle_copy, labelled, picture, tmp_path
):
    calibrate()
    packed = tmp_path / "packed"
    text = bdtool("pack", bundle_copy, "-o", packed, "--precision", "int8").stdout
    assert text.startswith(f"{packed}: 8 int8 parts, ONNX; ")
    common = ("--precision", "int8")
    before = bdtool_json("evaluate", bundle_copy, "--data", labelled, *common)
    assert bdtool_json("evaluate", packed, "--data", labelled, *common)["accuracy"] == before["accuracy"]
    assert len(bdtool_json("run", packed, picture, *common)["images"]) == 1
    facts = bdtool_json("inspect", packed)
    assert "onnx/full.onnx" in facts["left_out"]
    assert not any((packed / file).exists() for file in facts["left_out"])
    text = bdtool("inspect", packed).stdout
    assert f"left_out:       {len(facts['left_out'])} files, by `bdtool pack`: " in text
    assert "precisions:     int8\n" in text
    assert facts["kept"] == ["int8"]
    verified = bdtool_json("verify", packed, "--data", labelled, *common)
    assert (verified["ok"], verified["oracle"]) == (True, "ONNX")
    assert verified["rungs"]["onnx"]["detail"] == "not compared: `bdtool pack` left out the weights"
    assert 0 <= verified["rungs"]["engines"]["worst"] < verified["rungs"]["engines"]["bound"]
    for words in (("run", packed, picture), ("build", packed), ("fuse", packed, "-o", tmp_path / "model.onnx")):
        message = bdtool(*words, status=1).stderr
        assert f"{packed} has no fp32 parts; `bdtool pack` kept those of int8. Run it with --precision int8" in message
    assert "was left out" in bdtool("profile", packed, *common, status=1).stderr


def test_int8_without_pytorch_is_compared_with_the_fp32_parts(
    calibrate, bdtool, bdtool_json, bundle_copy, labelled, monkeypatch
):
    calibrate()
    words = ("verify", bundle_copy, "--data", labelled, "--precision", "int8")
    monkeypatch.setitem(sys.modules, "torch", None)
    result = bdtool_json(*words)
    assert result["ok"]
    assert result["rungs"]["manifest"]["detail"] == "not compared: PyTorch is not installed"
    assert result["rungs"]["onnx"]["worst"] > 1e-3  # as far as int8 is from fp32
    assert bdtool(*words).stdout.startswith(f"40 images of {labelled}, compared with ONNX\n")


def test_engines_in_place_of_parts_are_cached_by_build(bdtool, bdtool_json, bundle_copy, tmp_path):
    packed = tmp_path / "packed"
    message = bdtool("pack", bundle_copy, "-o", packed, "--engines", "onnxruntime", status=1).stderr
    assert "no directory onnxruntime-[0-9]*-fp32 has whole engines of all 8 parts; it has none" in message
    bdtool("build", bundle_copy)
    result = bdtool_json("pack", bundle_copy, "-o", packed, "--engines", "onnxruntime", "--with-full")
    assert (result["n_parts"], len(result["engines"])) == (9, 1)
    assert 0 < result["size_bytes"] < result["whole_size_bytes"]
    parts = bdtool_json("build", packed)["parts"]
    assert [part["status"] for part in parts.values()] == ["cached"] * 9  # `full`, which an engine alone is of, too
    bdtool("profile", packed, "--duration", 0.01)


def test_pack_says_where_fp16_is_still_to_be_made(bdtool, bdtool_json, bundle_copy, picture, tmp_path):
    words = ("pack", bundle_copy, "--precision", "fp16", "-o")
    text = bdtool(*words, tmp_path / "packed").stdout
    assert ": 8 fp32 parts, ONNX, which backends that make fp16 themselves convert; " in text
    bdtool("run", tmp_path / "packed", picture, "--precision", "fp16", "--backend", "torch")
    bdtool("build", bundle_copy, "--precision", "fp16", "--backend", "torch")
    assert bdtool_json(*words, tmp_path / "engines", "--engines", "torch")["precision"] == "fp16"
    bdtool("run", tmp_path / "engines", picture, "--precision", "fp16", "--backend", "torch")


def test_manifest_of_a_whole_bundle_says_nothing_of_packing(bundle_copy):
    assert "left_out" not in json.loads((bundle_copy / "manifest.json").read_text())


def test_model_for_triton_holds_a_bundle_that_commands_take(bdtool, bundle_copy, picture, tmp_path):
    model = tmp_path / "models" / "small"
    assert f"{model}: 8 fp32 parts, ONNX; " in bdtool("pack", bundle_copy, "-o", model, "--triton").stdout
    assert 'backend: "python"' in (model / "config.pbtxt").read_text()
    bdtool("build", model / "1" / "bundle")
    bdtool("run", model / "1" / "bundle", picture)

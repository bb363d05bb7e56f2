"""The whole line through the commands: a checkpoint with a policy network in, classes and a latency table out."""

import json
import math

import pytest
import torch
import torchvision

from bdtool.models import checkpoints
from bdtool.models.checkpoint_formats import CIFAR10_LABELS


@pytest.fixture(scope="module")
def line(blockdrop_checkpoint, shared_traces, tmp_path_factory):
    """A MODEL and a BUNDLE made by the commands from BlockDrop's own checkpoint format."""
    from click.testing import CliRunner

    from bdtool.cli import main

    directory = tmp_path_factory.mktemp("line")
    model, bundle = directory / "model.safetensors", directory / "bundle"
    colour = ("--mean", "0.5,0.4,0.45", "--std", "0.2,0.25,0.22")
    imported = CliRunner().invoke(
        main, ["import", str(blockdrop_checkpoint), "--arch", "resnet8", *colour, "-o", str(model)]
    )
    exported = CliRunner().invoke(main, ["export", str(model), "-o", str(bundle)])
    assert imported.exit_code == exported.exit_code == 0
    return model, bundle, imported, exported


def test_import_says_what_it_found(line):
    assert "resnet8, 10 classes, 3 blocks, with a policy network" in line[2].stdout
    assert "shortcut average-pool, mean 0.5,0.4,0.45, std 0.2,0.25,0.22" in line[2].stdout
    assert line[2].stderr == ""


def test_import_says_what_it_took_by_default(line, bdtool, blockdrop_checkpoint, tmp_path):
    assert "the file does not say shortcut: taken as in format blockdrop" in line[2].stdout
    words = ("import", blockdrop_checkpoint, "--arch", "resnet8", "-o", tmp_path / "model.safetensors")
    assert "does not say shortcut, mean, std: " in bdtool(*words).stdout
    told = ("--shortcut", "average-pool", "--mean", "0.5,0.4,0.45", "--std", "0.2,0.25,0.22")
    assert "does not say" not in bdtool(*words, *told).stdout


def test_import_takes_the_network_that_is_asked_for(bdtool, tmp_path):
    network = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.save({"state_dict_ema": network}, tmp_path / "net.pth")
    words = ("import", tmp_path / "net.pth", "--arch", "resnet18", "-o", tmp_path / "model.safetensors")
    assert "name the network to import: --entry state_dict_ema" in bdtool(*words, status=1).stderr
    assert "resnet18, 7 classes" in bdtool(*words, "--entry", "state_dict_ema").stdout


def test_import_of_an_imagenet_network_assumes_how_pictures_are_scaled(bdtool, tmp_path, monkeypatch):
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "net.pth")
    words = ("import", tmp_path / "net.pth", "--arch", "resnet18", "-o", tmp_path / "model.safetensors")
    text = bdtool(*words).stdout
    assert "std 0.229,0.224,0.225, resize 256 bilinear\n" in text
    assert "does not say resize, interpolation: taken as in format torchvision. Wrong ones cost accuracy: " in text
    assert "or give --resize-to, --interpolation\n" in text
    assert "does not say interpolation: " in bdtool(*words, "--resize-to", 240).stdout
    assert "does not say" not in bdtool(*words, "--resize-to", 240, "--interpolation", "bicubic").stdout
    monkeypatch.setattr(checkpoints, "sha256_of_file", lambda path: "f37072fd" + 56 * "0")
    text = bdtool(*words).stdout
    assert "by its digest it is torchvision's ResNet18_Weights.IMAGENET1K_V1" in text
    assert "does not say" not in text


def test_import_of_a_directory_says_what_tells_the_input(bdtool, tmp_path):
    network = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.save(network, tmp_path / "pytorch_model.bin")
    described = {"mean": [0.5] * 3, "std": [0.2] * 3, "input_size": [3, 64, 64], "interpolation": "bicubic"}
    config = {"architecture": "resnet18", "pretrained_cfg": described}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = bdtool("import", tmp_path, "--arch", "resnet18", "-o", tmp_path / "net.safetensors").stdout
    assert "mean 0.5,0.5,0.5, std 0.2,0.2,0.2, resize 73 bicubic\n" in text
    assert "what is not given is taken from config.json\n" in text
    assert "does not say" not in text


def test_export_says_how_close_the_parts_are(line):
    assert "9 parts, 3 blocks" in line[3].stdout  # policy, stem, 3 blocks, 2 shortcuts, head, full
    assert "worst difference from PyTorch" in line[3].stdout
    assert line[3].stderr == ""


def test_build_reports_each_part_and_then_finds_them(line, bdtool_json, bdtool):
    first = bdtool_json("build", line[1], "--no-resume")["parts"]
    assert {"policy", "stem", "block_00", "shortcut_01", "head", "full"} <= set(first)
    for entry in first.values():
        assert entry["status"] == "built"
        assert entry["seconds"] > 0
        assert entry["cached"] is False
    again = bdtool_json("build", line[1])["parts"]
    assert all(entry["cached"] and entry["status"] == "cached" for entry in again.values())
    assert "0 built in 0.0 s, 9 cached, 0 failed" in bdtool("build", line[1]).stdout


def test_verify_reports_every_rung(line, bdtool, bdtool_json, npz):
    result = bdtool_json("verify", line[1], "--data", npz)
    assert result["ok"] is True
    assert list(result["rungs"]) == ["digests", "manifest", "onnx", "engines", "policy", "logits", "top1"]
    assert all(rung["worst"] <= rung["bound"] for rung in result["rungs"].values())
    text = bdtool("verify", line[1], "--data", npz).stdout
    assert text.startswith(f"20 images of {npz}, compared with PyTorch\n")
    for name, rung in result["rungs"].items():  # what the numbers count stands beside them
        [row] = [row for row in text.splitlines() if row.startswith(f"{name} ")]
        assert f"  {rung['unit']}  " in row


def test_evaluate_gives_the_figures_of_the_contract(line, bdtool_json, npz):
    keys = {"accuracy", "n_images", "blocks_mean", "blocks_std", "flops_mean", "flops_std", "unique_policies"}
    by_model = bdtool_json("evaluate", line[0], "--data", npz)
    by_bundle = bdtool_json("evaluate", line[1], "--data", npz)
    assert keys <= set(by_model)
    assert by_model == by_bundle
    assert by_bundle["policy"] == "learned"


def test_limit_and_batch_are_kept(line, bdtool_json, npz):
    small = bdtool_json("evaluate", line[1], "--data", npz, "--limit", 7, "--batch", 3)
    assert small["n_images"] == 7
    assert small == bdtool_json("evaluate", line[1], "--data", npz, "--limit", 7)


def test_run_answers_for_each_image(line, bdtool_json, picture):
    rows = bdtool_json("run", line[1], picture, picture, "--policy", "101")["images"]
    assert len(rows) == 2
    for row in rows:
        assert {"label", "probability", "blocks_run", "policy"} <= set(row)
        assert row["label"] == CIFAR10_LABELS[row["class"]]
        assert (row["policy"], row["blocks_run"]) == ("101", 2)
        assert 0.1 <= row["probability"] <= 1  # the winner of ten


def test_run_lets_the_policy_network_decide(line, bdtool, bdtool_json, picture):
    row = bdtool_json("run", line[1], picture)["images"][0]
    assert row["blocks_run"] == row["policy"].count("1")
    assert row["policy"] in bdtool("run", line[1], picture).stdout


def test_profile_gives_the_figures_of_the_contract(line, bdtool_json, npz):
    words = ("profile", line[1], "--data", npz, "--policy", "110", "--duration", "0.05", "--warmup", "5")
    result = bdtool_json(*words)
    assert set(result["strategies"]) == {"full", "chain"}
    for strategy in result["strategies"].values():
        latency = strategy["latency_ms"]
        assert set(latency) == {"min", "mean", "median", "p90", "p95", "p99", "max"}
        names = ("min", "median", "p90", "p95", "p99", "max")
        held = [latency[name] for name in names if latency[name] is not None]  # p99 of a slow machine's few is not
        assert held == sorted(held)
        assert None not in (latency["min"], latency["median"], latency["max"])
        assert math.isclose(strategy["throughput_ips"], 1000 / latency["mean"])
    chain, full = result["strategies"]["chain"], result["strategies"]["full"]
    low, high = chain["ratio_to_full_iqr"]
    assert 0 < low <= chain["ratio_to_full"] <= high
    assert (full["ratio_to_full"], full["blocks_mean"], chain["blocks_mean"]) == (1, 3, 2)
    assert {"cpu", "threads", "backend", "python", "bdtool"} <= set(result["environment"])
    assert {"policy", "stem", "block_00", "block_01", "shortcut_02", "head"} == {p["name"] for p in result["parts"]}


def test_profile_prints_its_table_and_percentiles(line, bdtool):
    words = ("profile", line[1], "--percentile", "50,99.9", "--duration", "0.05", "--warmup", "0")
    result = bdtool(*words)
    assert "p50" in result.stdout
    assert "p99.9" in result.stdout
    assert "Engine calls of chain" in result.stdout
    assert "warning: the input is 64 synthetic pictures (seed 0), not real images" in result.stderr


def test_inspect_shows_model_and_bundle(line, bdtool, bdtool_json):
    model, bundle = bdtool_json("inspect", line[0]), bdtool_json("inspect", line[1])
    assert (model["kind"], bundle["kind"]) == ("MODEL", "BUNDLE")
    assert model["K"] == bundle["K"] == 3
    assert model["policy"] == bundle["policy"] == "learned"
    assert [p["name"] for p in bundle["parts"]] == [*(p["name"] for p in model["parts"]), "full"]
    assert bundle["provenance"]["format"] == "blockdrop"
    assert "preprocessing:  height 32, width 32" in bdtool("inspect", line[1]).stdout


def test_labels_of_a_file_are_shown(blockdrop_checkpoint, bdtool, tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(f"thing {i}" for i in range(10)))
    words = ("--arch", "resnet8", "--labels", tmp_path / "labels.txt", "-o", tmp_path / "model.safetensors")
    bdtool("import", blockdrop_checkpoint, *words)
    assert json.loads(bdtool("inspect", tmp_path / "model.safetensors", "--json", "-").stdout)["labels"][3] == "thing 3"


def test_labels_of_a_file_are_utf_8_with_or_without_a_mark(blockdrop_checkpoint, bdtool, bdtool_json, tmp_path):
    names = ["Äpfel", *(f"thing {i}" for i in range(9))]
    words = ("import", blockdrop_checkpoint, "--arch", "resnet8", "--labels", tmp_path / "labels.txt", "-o")
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "labels.txt").write_bytes("\r\n".join(names).encode(encoding))
        bdtool(*words, tmp_path / "model.safetensors")
        assert bdtool_json("inspect", tmp_path / "model.safetensors")["labels"] == names
    (tmp_path / "labels.txt").write_bytes("\n".join(names).encode("latin-1"))
    assert "expected a text file in UTF-8" in bdtool(*words, tmp_path / "other.safetensors", status=2).stderr

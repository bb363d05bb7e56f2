"""`--policy learned:THRESHOLD` in every command that takes a POLICY."""

import json
import re

import numpy as np
import onnx
import pytest

from bdtool import Orchestrator
from bdtool.data.synthetic import synthetic_images
from bdtool.runtime.masks import read_masks
from bdtool.runtime.policies import bits_of
from export.check import OnnxReference

POLICY = "learned:0.62"


def _kept(bundle, images):
    with Orchestrator.open(bundle) as runtime:
        return runtime.keep_probability(images) >= 0.62


@pytest.mark.parametrize("kind", ["bundle", "path"])
def test_evaluate_counts_what_is_kept(bdtool_json, tiny, npz, kind):
    found = bdtool_json("evaluate", getattr(tiny, kind), "--data", npz, "--policy", POLICY)
    assert found["policy"] == POLICY
    assert found["blocks_mean"] == _kept(tiny.bundle, np.load(npz)["x"]).sum(axis=1).mean()


def test_evaluate_puts_several_policies_side_by_side(bdtool, bdtool_json, tiny, npz):
    policies = (POLICY, "learned", "first:1")
    words = ["evaluate", tiny.bundle, "--data", npz]
    alone = [bdtool_json(*words, "--policy", policy) for policy in policies]
    together = [word for policy in policies for word in ("--policy", policy)]
    assert bdtool_json(*words, *together) == {"policies": alone}
    rows = [line for line in bdtool(*words, *together).stdout.splitlines() if re.match(r"(learned|first)", line)]
    assert [row.split()[0] for row in rows] == list(policies)
    assert f" {alone[0]['blocks_mean']:.2f} " in rows[0]


def test_evaluate_reads_all_policies_before_the_first_one_runs(bdtool, tiny, npz):
    words = ["evaluate", tiny.bundle, "--data", npz, "--policy", "all", "--policy"]
    for policy, says in (("first:9", "K = 9"), ("learned:2", "expected a threshold from 0 to 1")):
        result = bdtool(*words, policy, status=2)
        assert says in result.output
        assert "evaluating" not in result.output
        assert not result.stdout


def test_run_profile_and_report_decide_by_it(bdtool, bdtool_json, tiny, picture, npz, tmp_path):
    image = synthetic_images(1, height=32, width=32)
    [row] = bdtool_json("run", tiny.bundle, picture, "--policy", POLICY)["images"]
    assert row["policy"] == bits_of(_kept(tiny.bundle, image)[0])
    page, profiled = tmp_path / "page.html", tmp_path / "profile.json"
    words = ["profile", tiny.bundle, "--data", npz, "--policy", POLICY, "--duration", 0.01, "--strategy", "chain,path"]
    bdtool(*words, "--html", page, "--json", profiled)
    found = json.loads(profiled.read_text())
    blocks = _kept(tiny.bundle, np.load(npz)["x"]).sum(axis=1)
    assert found["policy"] == POLICY
    for strategy in (found["strategies"][name] for name in ("chain", "path")):
        ran = np.arange(strategy["n_requests"]) % len(blocks)  # the last time around maybe not all of them
        assert strategy["blocks_mean"] == pytest.approx(blocks[ran].mean())
    assert f"this policy: {POLICY}" in page.read_text(encoding="utf-8")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**found, "policy": "learned"}))
    compared = bdtool_json("compare", profiled, other, status=1)
    assert compared["verdict"] == "not comparable"
    assert compared["differences"]["keep_bits"] == {"a": POLICY, "b": "learned"}


def test_frequent_masks_are_those_at_the_threshold(bdtool_json, bundle_copy, npz):
    found = bdtool_json("build", bundle_copy, "--coverage", 1, "--data", npz, "--policy", POLICY)
    assert found["paths"]["policy"] == POLICY
    [noted] = {path.parent for path in (bundle_copy / "engines").rglob("paths.json")}
    masks = {count.mask for count in read_masks(noted, 3)}
    assert masks == {bits_of(keep) for keep in _kept(bundle_copy, np.load(npz)["x"])}


def test_calibrated_parts_are_verified_along_the_same_paths(calibrate, bdtool_json, bundle_copy, labelled):
    found = calibrate("--policy", POLICY)
    assert found["gates"]["policy"] == POLICY
    verified = bdtool_json("verify", bundle_copy, "--data", labelled, "--precision", "int8")
    assert verified["ok"] is True
    assert verified["rungs"]["logits"]["detail"].startswith(f"policy {POLICY}; ")
    assert json.loads((bundle_copy / "manifest.json").read_text())["threshold"] == 0.5  # the bundle's own stays
    assert bdtool_json("verify", bundle_copy, "--data", labelled)["ok"] is True


def test_fused_file_decides_by_it(bdtool, tiny, preprocessed, tmp_path):
    file = tmp_path / "fused.onnx"
    bdtool("fuse", tiny.bundle, "-o", file, "--threshold", 0.62)
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    assert facts["threshold"] == 0.62
    fused, images = OnnxReference(file.read_bytes()), preprocessed(tiny.model, 8)
    keep = [fused.run({"image": image[None]})["keep"] for image in images]
    np.testing.assert_array_equal(keep, _kept(tiny.bundle, images))


def test_training_takes_blocks_in_its_place(bdtool, tiny, npz, tmp_path):
    words = ["train", "finetune", tiny.path, "--data", npz, "--policy", POLICY, "-o", tmp_path / "model.safetensors"]
    assert f"policy {POLICY}: one threshold is for deployment. Train with learned, and --blocks" in (
        bdtool(*words, status=2).output
    )

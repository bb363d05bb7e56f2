"""The programs of docs/bundles.md run a bundle without bdtool, and say what `bdtool run` says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "bundles.md"
_PARTS, _FUSED = re.findall(r"^```python\n(.*?)^```$", _PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
_ALONE = "import sys\nfor name in ('bdtool', 'export', 'engines', 'calibration', 'torch'): sys.modules[name] = None\n"


def _said(program, *words):
    command = [sys.executable, "-c", _ALONE + program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@pytest.fixture
def said_by_bdtool(bdtool_json, picture):
    def run(bundle, *options):
        (image,) = bdtool_json("run", bundle, picture, *options)["images"]
        return f"{image['class']} with {image['blocks_run']} of 3 blocks"

    return run


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16"])
def test_parts_one_by_one(calibrate, bdtool, bundle_copy, picture, said_by_bdtool, tmp_path, precision):
    if precision != "fp32":
        calibrate("--precision", precision)
    expected = said_by_bdtool(bundle_copy, "--precision", precision)
    assert _said(_PARTS, bundle_copy, picture, precision) == expected
    bdtool("pack", bundle_copy, "-o", tmp_path / "packed", "--precision", precision)
    assert _said(_PARTS, tmp_path / "packed", picture, precision) == expected


def test_network_without_policy_runs_all_blocks(export_random, picture, said_by_bdtool):
    bundle = export_random("resnet8", shortcut="average-pool", has_policy=False).bundle
    said = _said(_PARTS, bundle, picture)
    assert said == said_by_bdtool(bundle)
    assert said.endswith("with 3 of 3 blocks")


def test_network_that_was_trained_for_a_mask_runs_it(bdtool, export_random, picture, said_by_bdtool, tmp_path):
    bundle = export_random("resnet8", shortcut="average-pool", has_policy=False, mask="101").bundle
    bdtool("fuse", bundle, "-o", tmp_path / "model.onnx")
    for said in (_said(_PARTS, bundle, picture), _said(_FUSED, tmp_path / "model.onnx", picture)):
        assert said == said_by_bdtool(bundle)
        assert said.endswith("with 2 of 3 blocks")


def test_one_file(bdtool, tiny, picture, said_by_bdtool, tmp_path):
    bdtool("fuse", tiny.bundle, "-o", tmp_path / "model.onnx")
    assert _said(_FUSED, tmp_path / "model.onnx", picture) == said_by_bdtool(tiny.bundle)

"""Bundles that are damaged, moved or unfinished, as the commands meet them."""

import json

import pytest

from bdtool.errors import EngineError
from engines.fake import FakeBackend


def _edit(bundle, change):
    data = json.loads((bundle / "manifest.json").read_text())
    change(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


def _cut_part(bundle):
    data = (bundle / "onnx" / "block_01.onnx").read_bytes()
    (bundle / "onnx" / "block_01.onnx").write_bytes(data[:-1])


DAMAGE = {
    "cut": (_cut_part, "part 'block_01', onnx/block_01.onnx, has SHA-256"),
    "missing": (lambda b: (b / "onnx" / "head.onnx").unlink(), "part 'head' is missing: no file onnx/head.onnx"),
    "newer": (lambda b: _edit(b, lambda d: d.update(format_version=9)), "format_version 9 is newer"),
    "leaving": (
        lambda b: _edit(b, lambda d: d["parts"][0].update(file="../secret.onnx")),
        "the path '../secret.onnx' leaves the bundle",
    ),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "is not a bundle: it has no manifest.json"),
}


@pytest.mark.parametrize("is_built", [False, True], ids=["new", "built"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bundle_is_refused_by_every_command(bdtool, bundle_copy, npz, picture, digests, damage, is_built):
    if is_built:
        bdtool("build", bundle_copy)
    make, message = DAMAGE[damage]
    make(bundle_copy)
    before = digests(bundle_copy)
    commands = [("build",), ("verify",), ("run", picture), ("evaluate", "--data", npz), ("profile",), ("inspect",)]
    for command, *words in commands:
        done = bdtool(command, bundle_copy, *words, status=1)
        assert message in done.stderr + done.stdout  # `verify` has it in its table
    assert digests(bundle_copy) == before


def test_verify_tells_scripts_which_files_are_damaged(bdtool, bundle_copy):
    _cut_part(bundle_copy)
    found = json.loads(bdtool("verify", bundle_copy, "--json", "-", status=1).stdout)
    assert not found["ok"]
    assert list(found["rungs"]) == ["digests"]  # nothing else is compared
    assert (found["rungs"]["digests"]["ok"], found["rungs"]["digests"]["worst"]) == (False, 1)
    assert "onnx/block_01.onnx" in found["rungs"]["digests"]["detail"]


def test_moved_bundle_works_without_a_new_build(bdtool, bdtool_json, bundle_copy, picture):
    bdtool("build", bundle_copy)
    here = bdtool_json("run", bundle_copy, picture)
    moved = bundle_copy.rename(bundle_copy.with_name("moved"))
    assert all(part["cached"] for part in bdtool_json("build", moved)["parts"].values())
    assert bdtool_json("run", moved, picture) == here


def test_damaged_engine_is_built_again(bdtool_json, bundle_copy, picture):
    before = bdtool_json("run", bundle_copy, picture)
    bdtool_json("build", bundle_copy)
    engine = next((bundle_copy / "engines").rglob("block_01.onnx"))
    engine.write_bytes(engine.read_bytes()[:-5])
    assert bdtool_json("run", bundle_copy, picture) == before
    statuses = {name: part["status"] for name, part in bdtool_json("build", bundle_copy)["parts"].items()}
    assert set(statuses.values()) == {"cached"}


def test_part_that_does_not_build_fails_the_command_but_not_the_others(bdtool, bundle_copy, monkeypatch):

    build = FakeBackend.build

    def refuse(self, part, model, *, layout):
        if part.name == "block_01":
            raise EngineError("part 'block_01': refused")
        return build(self, part, model, layout=layout)

    monkeypatch.setattr(FakeBackend, "build", refuse)
    result = bdtool("build", bundle_copy, "--backend", "fake", "--json", "-", status=1)
    statuses = {name: part["status"] for name, part in json.loads(result.stdout)["parts"].items()}
    assert [name for name, status in statuses.items() if status == "failed"] == ["block_01"]
    assert "Error: part 'block_01': refused" in result.stderr

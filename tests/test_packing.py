"""Bundles packed for deployment: what stays, what still works, and what they say of the rest."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bdtool import Orchestrator, packing
from bdtool.data.synthetic import synthetic_images
from bdtool.errors import BundleError, UsageError
from bdtool.packing import pack
from bdtool.runtime.masks import MaskCount, write_masks
from bdtool.runtime.recommendation import Recommendation, write_recommendation
from engines import copying
from engines.base import BackendIdentity
from engines.fake import FakeBackend
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle
from export.files import export_lock
from export.manifest import Variant, read_manifest, write_manifest

_FAKE = BackendIdentity(name="fake", version="1", target="cpu", suffix=".json")
_PIXELS = synthetic_images(8, height=32, width=32)


def _logits(bundle, **options):
    with Orchestrator.open(bundle, **options) as runtime:
        return runtime.run(_PIXELS).logits


def _files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def _pack(whole, target, **options):
    return pack(Bundle.open(whole), target, **options)


@pytest.fixture
def packed(tiny, tmp_path):
    """The ONNX parts of `tiny` alone."""
    _pack(tiny.bundle, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def built(bundle_copy):
    """A whole bundle with engines of ONNX Runtime."""
    store = EngineStore(Bundle.open(bundle_copy), identify_backend("onnxruntime", "cpu"))
    store.build(lambda: open_backend("onnxruntime", "cpu"))
    return bundle_copy


def test_packed_bundle_holds_the_parts_and_gives_the_same_logits(tiny, packed):
    parts = {f"onnx/{part.name}.onnx" for part in Bundle.open(tiny.bundle).network.parts if part.kind != "full"}
    assert _files(packed) == {"manifest.json", *parts}
    for strategy in ("chain", "path", "fused"):
        np.testing.assert_array_equal(
            _logits(packed, strategy=strategy), _logits(tiny.bundle, strategy=strategy), err_msg=strategy
        )


def test_older_versions_are_told_to_upgrade(tiny, packed):
    assert json.loads((tiny.bundle / "manifest.json").read_text())["format_version"] == 1
    assert json.loads((packed / "manifest.json").read_text())["format_version"] == 2


def test_sizes_are_those_of_the_directories(tiny, tmp_path):
    result = _pack(tiny.bundle, tmp_path / "packed")
    assert result.size_bytes == sum((tmp_path / "packed" / file).stat().st_size for file in _files(tmp_path / "packed"))
    assert result.size_bytes < 0.5 * result.whole_size_bytes


def test_file_that_goes_while_sizes_are_added_up_is_no_error(bundle_copy, tmp_path, monkeypatch):
    gone, real = bundle_copy / "onnx" / "gone.tmp", Path.is_file

    def is_file(path):
        was = real(path)
        if path == gone:
            gone.unlink(missing_ok=True)
        return was

    gone.touch()
    monkeypatch.setattr(Path, "is_file", is_file)
    _pack(bundle_copy, tmp_path / "packed")


def test_packed_bundle_can_be_packed_again_moved_and_built(packed, tmp_path):
    _pack(packed, tmp_path / "again")
    assert _files(tmp_path / "again") == _files(packed)
    moved = Path(shutil.move(tmp_path / "again", tmp_path / "moved"))
    statuses = EngineStore(Bundle.open(moved), _FAKE).build(FakeBackend)
    assert {status.name for status in statuses} == {
        part.name for part in Bundle.open(moved).network.parts if part.kind != "full"
    }


def test_precisions_that_are_not_packed_are_not_listed(bundle_copy, tmp_path):
    manifest = read_manifest(bundle_copy)
    other = Variant(activation="float16", files=manifest.files, calibration={})
    write_manifest(bundle_copy, replace(manifest, variants={"fp16": other}))
    _pack(bundle_copy, tmp_path / "packed")
    assert Bundle.open(bundle_copy).precisions == ("fp32", "fp16")
    assert Bundle.open(tmp_path / "packed").precisions == ("fp32",)


def test_full_is_kept_where_it_is_asked_for(tiny, tmp_path):
    _pack(tiny.bundle, tmp_path / "packed", with_full=True)
    assert read_manifest(tmp_path / "packed").left_out == {"weights.safetensors"}
    _logits(tmp_path / "packed", strategy="full")


def test_what_was_left_out_is_named(packed):
    with pytest.raises(
        BundleError, match=r"part 'full' has to be built for onnxruntime.*full.onnx, was left out by `bdtool pack`"
    ):
        Orchestrator.open(packed, strategy="full")
    with pytest.raises(BundleError, match=r"the weights, weights.safetensors, was left out .* Take the whole bundle"):
        _ = Bundle.open(packed).weights_path


def test_missing_or_changed_part_of_a_packed_bundle_is_still_found(packed):
    (packed / "onnx" / "head.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"onnx/head.onnx, has SHA-256"):
        Bundle.open(packed)
    (packed / "onnx" / "head.onnx").unlink()
    with pytest.raises(BundleError, match="part 'head' is missing"):
        Bundle.open(packed)


def test_engines_take_the_place_of_parts(built, tmp_path):
    store = EngineStore(Bundle.open(built), identify_backend("onnxruntime", "cpu"))
    write_masks(store.directory, [MaskCount(mask="101", share=1.0)], source="test", policy="learned")
    result = _pack(built, tmp_path / "packed", engines="onnxruntime")
    assert result.engines == (store.directory.name,)
    assert not (tmp_path / "packed" / "onnx").exists()
    names = {path.name for path in (tmp_path / "packed" / "engines" / store.directory.name).iterdir()}
    assert names == {path.name for path in store.directory.iterdir() if not path.name.startswith("full.")}
    for strategy in ("chain", "path", "fused"):
        np.testing.assert_array_equal(
            _logits(tmp_path / "packed", strategy=strategy), _logits(built, strategy=strategy)
        )
    packed_store = EngineStore(Bundle.open(tmp_path / "packed"), store.identity)
    assert all(status.cached for status in packed_store.build(lambda: pytest.fail("nothing to build")))


def test_strategy_that_auto_takes_goes_along_with_the_engines(built, tmp_path):
    threads = open_backend("onnxruntime", "cpu").threads
    measured = Recommendation(
        strategy="path", threads=threads, batch=1, policy="learned", medians_ms={}, input_source="test", versions={}
    )
    write_recommendation(EngineStore(Bundle.open(built), identify_backend("onnxruntime", "cpu")).directory, measured)
    _pack(built, tmp_path / "packed", engines="onnxruntime")
    with Orchestrator.open(tmp_path / "packed", strategy="auto") as runtime:
        assert runtime.strategy_name == "path"


@pytest.mark.parametrize("engines", [None, "onnxruntime"])
def test_masks_go_along_and_serve_other_engines(built, tmp_path, engines):
    elsewhere = built / "engines" / "torch-2.0-cuda-fp32"
    other = built / "engines" / "torch-2.0-cuda-int8"
    for directory in (elsewhere, other):
        directory.mkdir()
        write_masks(directory, [MaskCount(mask="101", share=1.0)], source="test", policy="learned")
    _pack(built, tmp_path / "packed", engines=engines)
    assert (tmp_path / "packed" / "engines" / elsewhere.name / "paths.json").is_file()
    assert not (tmp_path / "packed" / "engines" / other.name).exists()
    with Orchestrator.open(tmp_path / "packed", strategy="path") as runtime:
        assert runtime.path_stats.joined == 1
        assert runtime.run(_PIXELS, policy="101").hits.all()


def test_engines_of_another_machine_are_refused_by_name(built, tmp_path):
    _pack(built, tmp_path / "packed", engines="onnxruntime")
    [directory] = (tmp_path / "packed" / "engines").iterdir()
    directory.rename(directory.with_name("onnxruntime-0.1-cpu-z80-fp32"))
    with pytest.raises(
        BundleError, match=r"part 'policy' has to be built for onnxruntime.* \(there are onnxruntime-0.1-cpu-z80-fp32\)"
    ):
        Orchestrator.open(tmp_path / "packed")


def test_build_does_not_pass_over_an_engine_that_is_damaged(built, tmp_path):
    _pack(built, tmp_path / "packed", engines="onnxruntime")
    store = EngineStore(Bundle.open(tmp_path / "packed"), identify_backend("onnxruntime", "cpu"))
    (store.directory / "head.onnx").write_bytes(b"other")
    damaged = r"part 'head' has to be built for onnxruntime.*, as head.onnx there was changed or cut short .*left out"
    with pytest.raises(BundleError, match=damaged):
        store.build(lambda: pytest.fail("nothing to build from"))
    with pytest.raises(BundleError, match=damaged):
        Orchestrator.open(tmp_path / "packed")


def test_damaged_engine_of_a_read_only_bundle_is_named_and_nothing_else(built, tmp_path, monkeypatch, caplog):
    packed = tmp_path / "packed"
    _pack(built, packed, engines="onnxruntime")
    [head] = packed.glob("engines/*/head.onnx")
    head.write_bytes(b"other")
    real = os.access  # for root every place is writable, whatever its mode
    monkeypatch.setattr(os, "access", lambda path, mode: path != packed and real(path, mode))
    with pytest.raises(BundleError, match=r"an engine of part 'head' has to be built for onnxruntime"):
        Orchestrator.open(packed)
    assert "read-only" not in caplog.text


def test_engine_that_a_build_replaces_meanwhile_fits_its_record(built, tmp_path, monkeypatch):
    real = copying.sha256_of_bytes

    def replace_after(data):
        digest = real(data)
        for engine in (built / "engines").glob("*/*.onnx"):
            engine.write_bytes(b"of the next build")
        return digest

    [stem] = built.glob("engines/*/stem.onnx")
    monkeypatch.setattr(copying, "sha256_of_bytes", replace_after)
    digests = {"stem": Bundle.open(built).part_sha256(Bundle.open(built).network.part("stem"))}
    assert copying.copy_engines(stem.parent, tmp_path / "copy", digests)
    record = json.loads((tmp_path / "copy" / "stem.engine.json").read_text())
    assert record["sha256"] == real((tmp_path / "copy" / "stem.onnx").read_bytes())


@pytest.mark.parametrize("damage", ["none built", "one missing", "one changed", "of other parts", "no digest"])
def test_engines_that_are_not_whole_are_not_packed(built, tmp_path, damage):
    [directory] = (built / "engines").iterdir()
    record = directory / "stem.engine.json"
    if damage == "none built":
        shutil.rmtree(directory)
    elif damage == "one missing":
        record.unlink()
    elif damage == "one changed":
        (directory / json.loads(record.read_text())["file"]).write_bytes(b"other")
    else:
        other = "0" * 64 if damage == "of other parts" else 0
        record.write_text(json.dumps({**json.loads(record.read_text()), "onnx_sha256": other}))
    with pytest.raises(BundleError, match=r"no directory onnxruntime-.*-fp32 has whole engines of all 8 parts"):
        _pack(built, tmp_path / "packed", engines="onnxruntime")
    assert not list(tmp_path.glob("*packed*"))


def test_place_that_is_taken_is_left_alone(tiny, packed):
    before = _files(packed)
    with pytest.raises(BundleError, match="exists; it is left alone"):
        _pack(tiny.bundle, packed)
    assert _files(packed) == before


@pytest.mark.parametrize("moment", ["export_lock", "write_manifest"])
def test_place_that_is_taken_meanwhile_is_left_alone(tiny, tmp_path, monkeypatch, moment):
    target, real = tmp_path / "packed", getattr(packing, moment)

    def take(*args):
        target.mkdir()
        (target / "other").touch()
        return real(*args)

    monkeypatch.setattr(packing, moment, take)
    with pytest.raises(BundleError, match="exists; it is left alone"):
        _pack(tiny.bundle, target)
    assert _files(tmp_path) == {"packed/other"}


def test_place_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"file/packed cannot be written \(.*\); .* run the same command again"):
        _pack(tiny.bundle, tmp_path / "file" / "packed")


def test_two_packs_to_one_place_do_not_meet(tiny, tmp_path):
    with export_lock(tmp_path / "packed"), pytest.raises(BundleError, match=r"a pack to .*packed, or .* is already"):
        _pack(tiny.bundle, tmp_path / "packed")


def test_stop_half_way_leaves_nothing(tiny, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("bdtool.packing.write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        _pack(tiny.bundle, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_pack_left_is_not_packed(tiny, tmp_path):
    left = tmp_path / ".packed.packing" / "onnx" / "left.onnx"
    left.parent.mkdir(parents=True)
    left.touch()
    _pack(tiny.bundle, tmp_path / "packed")
    assert "onnx/left.onnx" not in _files(tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_link_to_an_empty_directory_stays_one(tiny, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "packed").symlink_to("disk")
    _pack(tiny.bundle, tmp_path / "packed")
    assert (tmp_path / "packed").is_symlink()
    assert (tmp_path / "disk" / "manifest.json").is_file()


def test_precision_that_is_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(BundleError, match="has no int8 parts"):
        _pack(tiny.bundle, tmp_path / "packed", precision="int8")
    with pytest.raises(UsageError, match="unknown precision"):
        _pack(tiny.bundle, tmp_path / "packed", precision="int4")


@pytest.mark.parametrize("name", ["onnx", "*", "/engines", "a**b", ""])
def test_backend_that_there_is_not_is_refused(built, tmp_path, name):
    with pytest.raises(UsageError, match=r"unknown backend .*; this version has onnxruntime, torch"):
        _pack(built, tmp_path / "packed", engines=name)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (["../other"], "leaves the bundle"),
        ("onnx/full.onnx", "left_out is 'onnx/full.onnx', expected a list of files; pack the whole bundle again"),
        ({"onnx/full.onnx": 1}, "expected a list of files"),
        (None, "left_out is None, expected a list of files"),
        ([5], "expected a list of files"),
    ],
)
def test_left_out_that_is_no_list_of_files_in_the_bundle_is_refused(bundle_copy, left_out, message):
    path = bundle_copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "left_out": left_out}))
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle_copy)

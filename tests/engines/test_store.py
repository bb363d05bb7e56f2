"""Engines are built once for each content and target; a build that fails or stops loses nothing."""

import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from bdtool.errors import BackendError, BundleError, EngineError
from engines import engine_files, registry
from engines.base import BackendIdentity, LayoutError
from engines.fake import FakeBackend
from engines.layouts import run_plain
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle
from export.check import OnnxReference
from export.files import sha256_of_file

FAKE = BackendIdentity(name="fake", version="1", target="cpu", suffix=".json")


def _store(path, **options):
    return EngineStore(Bundle.open(path), options.pop("identity", FAKE), **options)


def _never():
    pytest.fail("a build with nothing to do opened its backend")


def _statuses(statuses):
    return {status.name: status.status for status in statuses}


@pytest.fixture
def built(bundle_copy):
    """A bundle whose parts the fake backend has built."""
    _store(bundle_copy).build(FakeBackend)
    return bundle_copy


def test_first_build_builds_everything_under_a_name_that_says_what_for(bundle_copy):
    store = _store(bundle_copy)
    statuses = store.build(FakeBackend)
    assert [status.name for status in statuses] == [part.name for part in store._bundle.network.parts]
    assert set(_statuses(statuses).values()) == {"built"}
    assert store.directory == bundle_copy / "engines" / "fake-1-cpu-fp32"


def test_second_build_finds_all_and_opens_no_backend(bundle_copy):
    first = _store(bundle_copy).build(FakeBackend)
    seen = []
    statuses = _store(bundle_copy).build(_never, on_part=seen.append)
    assert statuses == seen
    assert all(status.cached and status.seconds == 0 for status in statuses)
    assert [status.record for status in statuses] == [status.record for status in first]


def test_engines_of_another_recipe_are_built_again(bundle_copy, monkeypatch):
    identity = identify_backend("onnxruntime", "cpu")
    _store(bundle_copy, identity=identity).build(lambda: open_backend("onnxruntime", "cpu"))
    assert all(status.cached for status in _store(bundle_copy, identity=identity).build(_never))
    monkeypatch.setattr(registry, "_ONNXRUNTIME_RECIPE", "another recipe")
    changed = _store(bundle_copy, identity=identify_backend("onnxruntime", "cpu"))
    assert set(_statuses(changed.build(lambda: open_backend("onnxruntime", "cpu"))).values()) == {"built"}


def test_no_resume_builds_everything_again(built):
    statuses = _store(built).build(FakeBackend, resume=False)
    assert set(_statuses(statuses).values()) == {"built"}


def _rebuilt(path, **options):
    statuses = _statuses(_store(path, **options).build(FakeBackend))
    return {name for name, status in statuses.items() if status == "built"}


@pytest.mark.parametrize("damage", ["tampered", "deleted", "record deleted", "record garbage", "record nested"])
def test_damaged_engine_is_built_again_and_no_other(built, damage):
    engine = built / "engines" / "fake-1-cpu-fp32" / "block_01.json"
    record = engine.with_name("block_01.engine.json")
    if damage == "tampered":
        engine.write_bytes(b"{ }")
    elif damage == "deleted":
        engine.unlink()
    elif damage == "record deleted":
        record.unlink()
    else:
        record.write_text("{" if damage == "record garbage" else "[" * 200_000)
    assert _rebuilt(built) == {"block_01"}
    assert _rebuilt(built) == set()


def test_engine_that_cannot_be_read_is_built_again(built, monkeypatch):
    engine = _store(built).directory / "block_01.json"
    real = os.access  # root reads every file, whatever its mode
    monkeypatch.setattr(os, "access", lambda path, mode: path != engine and real(path, mode))
    assert _rebuilt(built) == {"block_01"}


def test_named_pipe_in_the_place_of_an_engine_is_not_waited_for(built):
    engine = _store(built).directory / "block_01.json"
    engine.unlink()
    os.mkfifo(engine)
    assert "block_01" not in _store(built).find(check_digests=False)
    assert _rebuilt(built) == {"block_01"}


@pytest.mark.parametrize("field", ["onnx_sha256", "backend", "backend_version", "target", "precision", "part", "file"])
def test_engine_of_other_content_or_target_is_built_again(built, field):
    record = built / "engines" / "fake-1-cpu-fp32" / "head.engine.json"
    data = json.loads(record.read_text())
    record.write_text(json.dumps({**data, field: "something else"}))
    assert _rebuilt(built) == {"head"}


@pytest.mark.parametrize("field", [{"layout": []}, {"sha256": None}, {"error": "small"}, {"details": "none"}], ids=str)
def test_record_with_a_field_of_another_type_is_none(built, field):
    record = built / "engines" / "fake-1-cpu-fp32" / "head.engine.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **field}))
    assert "head" not in _store(built).find(check_digests=False)
    assert _rebuilt(built) == {"head"}


@pytest.mark.parametrize("change", [{"version": "2"}, {"target": "cuda0"}, {"name": "other"}])
def test_other_backend_version_or_target_has_engines_of_its_own(built, change):
    identity = BackendIdentity(**{"name": "fake", "version": "1", "target": "cpu", "suffix": ".json", **change})
    assert len(_rebuilt(built, identity=identity)) == 9
    assert _rebuilt(built) == set()


def test_engines_that_normalise_images_otherwise_are_built_again(bundle_copy):
    identity = replace(FAKE, takes_pixels=True)
    assert len(_rebuilt(bundle_copy, identity=identity)) == 9
    manifest = bundle_copy / "manifest.json"
    data = json.loads(manifest.read_text())
    data["preprocessing"]["mean"] = [0.1, 0.2, 0.3]
    manifest.write_text(json.dumps(data))
    assert _rebuilt(bundle_copy, identity=identity) == {"policy", "stem", "full"}
    assert _rebuilt(bundle_copy, identity=identity) == set()


def test_layers_of_an_earlier_engine_are_not_kept(bundle_copy, monkeypatch):
    real = FakeBackend.build
    with monkeypatch.context() as patch:
        patch.setattr(FakeBackend, "build", lambda *args, **words: replace(real(*args, **words), layers="{}"))
        _store(bundle_copy).build(FakeBackend)
    directory = _store(bundle_copy).directory
    assert len(list(directory.glob("*.layers.json"))) == 9
    _store(bundle_copy).build(FakeBackend, resume=False)
    assert list(directory.glob("*.layers.json")) == []


def test_record_cannot_point_at_another_file(built):
    directory = built / "engines" / "fake-1-cpu-fp32"
    record = directory / "head.engine.json"
    data = json.loads(record.read_text())
    record.write_text(json.dumps({**data, "file": "../../onnx/head.onnx"}))
    assert _rebuilt(built) == {"head"}


def test_build_removes_what_a_killed_one_left(built):
    directory = built / "engines" / "fake-1-cpu-fp32"
    left, written = directory / ".head.json.abcd1234.tmp", directory / ".stem.json.abcd1234.tmp"
    for file in (left, written):
        file.touch()
    os.utime(left, (0, 0))
    (directory / "head.json").unlink()
    assert _rebuilt(built) == {"head"}
    assert list(directory.glob(".*")) == [written], "another build may be at work"


class _Unrepeatable(FakeBackend):
    """Builds no part to the same bytes twice, as ONNX Runtime does not, and waits between part and part."""

    def build(self, part, model, *, layout):
        time.sleep(0.005)
        built = super().build(part, model, layout=layout)
        return replace(built, data=json.dumps({**json.loads(built.data), "salt": os.urandom(4).hex()}).encode())


def test_builds_at_the_same_time_share_their_engines(bundle_copy):
    with ThreadPoolExecutor(4) as pool:  # a lock of a file holds between threads as between processes
        found = list(pool.map(lambda _: _store(bundle_copy).build(_Unrepeatable), range(4)))
    kinds = [set(_statuses(statuses).values()) for statuses in found]
    assert kinds.count({"built"}) == 1
    assert kinds.count({"cached"}) == 3
    store = _store(bundle_copy)
    records = store.find()  # looks at digests
    assert set(records) == {part.name for part in store.network.parts}
    assert not list(store.directory.glob(".*"))


def test_stopped_build_goes_on_where_it_stopped(bundle_copy):
    seen = []

    def stop(status):
        seen.append(status.name)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _store(bundle_copy).build(FakeBackend, on_part=stop)
    statuses = _statuses(_store(bundle_copy).build(FakeBackend))
    assert [name for name, status in statuses.items() if status == "cached"] == seen
    Bundle.open(bundle_copy)


def test_failing_part_does_not_stop_the_others(bundle_copy):
    backend = FakeBackend()
    backend.broken = {"block_01"}
    statuses = _store(bundle_copy).build(lambda: backend)
    assert {s.name: s.message for s in statuses if s.status == "failed"} == {
        "block_01": "part 'block_01': the fake backend was told to fail"
    }
    assert sum(status.status == "built" for status in statuses) == 8
    assert _rebuilt(bundle_copy) == {"block_01"}


def test_backend_that_is_not_usable_stops_the_build(bundle_copy):
    def refuse():
        raise BackendError("no such device")

    with pytest.raises(BackendError, match="no such device"):
        _store(bundle_copy).build(refuse)


def test_full_disk_is_named(bundle_copy, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine_files, "write_bytes", full)
    with pytest.raises(
        BundleError, match=r"engines cannot be written \(No space left on device\).*run the same command"
    ):
        _store(bundle_copy).build(FakeBackend)
    Bundle.open(bundle_copy)


def test_precision_without_parts_is_refused(bundle_copy):
    with pytest.raises(BundleError, match="has no int8 parts"):
        _store(bundle_copy, precision="int8")


def _run_chain(store, backend, images):
    network, records = store._bundle.network, store.find()
    engines, x = store.load(backend, records), images
    for part in network.parts:
        if part.kind in ("stem", "block", "head"):
            x = run_plain(engines[part.name], part, {part.inputs[0].name: x})[part.outputs[0].name]
    return x


def _expected(bundle, images):
    path = bundle.part_path(bundle.network.require("full"))
    return OnnxReference(path.read_bytes()).run({"image": images})["logits"]


def test_stored_engines_of_onnxruntime_compute_what_the_onnx_says(bundle_copy, cpu, tiny, preprocessed):
    store = _store(bundle_copy, identity=identify_backend("onnxruntime", "cpu"))
    store.build(lambda: cpu)
    images = preprocessed(tiny.model, 3)
    expected = _expected(Bundle.open(bundle_copy), images)
    np.testing.assert_allclose(_run_chain(store, cpu, images), expected, atol=1e-4, rtol=1e-4)
    assert {record.layout for record in store.find().values()} == {cpu.activation_layout(store._bundle.network)}


def test_part_that_cannot_be_cut_makes_all_parts_plain(
    bundle_copy, cpu, native, tiny, preprocessed, monkeypatch, caplog
):
    from engines import onnxrt

    cut = onnxrt.cut_guards

    def fail_at_the_second_block(model, part):
        if part.name == "block_01":
            raise LayoutError("part 'block_01': the optimiser did something new")
        cut(model, part)

    monkeypatch.setattr(onnxrt, "cut_guards", fail_at_the_second_block)
    store = _store(bundle_copy, identity=identify_backend("onnxruntime", "cpu"))
    with caplog.at_level(logging.WARNING):
        statuses = store.build(lambda: cpu)
    assert "'block_01'" in caplog.text
    assert "plain NCHW" in caplog.text
    assert [status.record.layout for status in statuses] == ["NCHW"] * 9
    images = preprocessed(tiny.model, 2)
    expected = _expected(Bundle.open(bundle_copy), images)
    np.testing.assert_allclose(_run_chain(store, cpu, images), expected, atol=1e-4, rtol=1e-4)
    assert all(status.cached for status in store.build(_never))


def test_engines_of_two_layouts_are_not_mixed(built):
    """A fallback to plain layout that was stopped half-way leaves two layouts behind."""
    record = built / "engines" / "fake-1-cpu-fp32" / "head.engine.json"
    data = json.loads(record.read_text())
    record.write_text(json.dumps({**data, "layout": "NCHW16c"}))
    assert _store(built).find() == {}
    assert len(_rebuilt(built)) == 9


def test_find_looks_at_the_parts_asked_for(built):
    store = _store(built)
    (store.directory / "full.json").unlink()
    assert set(store.find([store._bundle.network.part("head")])) == {"head"}
    assert "full" not in store.find()


def test_engine_that_does_not_load_names_its_part(bundle_copy, cpu):
    store = _store(bundle_copy, identity=identify_backend("onnxruntime", "cpu"))
    store.build(FakeBackend)  # writes files that ONNX Runtime cannot read
    with pytest.raises(EngineError, match=r"part 'policy': ONNX Runtime cannot load its engine"):
        store.load(cpu, store.find())


def _change(file):
    """Change one byte of a file; return what it was."""
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    return before


def test_part_that_changed_since_the_bundle_was_opened_is_not_built(bundle_copy):
    store = _store(bundle_copy)
    before = _change(bundle_copy / "onnx" / "block_01.onnx")
    with pytest.raises(BundleError, match=r"part 'block_01', onnx/block_01.onnx, has SHA-256 .* Copy the bundle again"):
        store.build(FakeBackend)
    (bundle_copy / "onnx" / "block_01.onnx").write_bytes(before)
    assert _statuses(store.build(FakeBackend))["block_01"] == "built"


def test_edited_part_that_does_not_fit_loses_no_other(bundle_copy):
    file = bundle_copy / "onnx" / "block_01.onnx"
    file.write_bytes(b"")
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    next(part for part in manifest["parts"] if part["name"] == "block_01")["sha256"] = sha256_of_file(file)
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    statuses = _store(bundle_copy).build(FakeBackend)
    [failed] = [status for status in statuses if status.status != "built"]
    assert (failed.name, failed.status) == ("block_01", "failed")
    assert "part 'block_01', onnx/block_01.onnx, is no valid ONNX model" in failed.message


def test_part_that_went_since_the_bundle_was_opened_is_named(bundle_copy):
    store = _store(bundle_copy)
    (bundle_copy / "onnx" / "head.onnx").unlink()
    with pytest.raises(BundleError, match=r"part 'head', onnx/head.onnx, cannot be read \(No such file"):
        store.build(FakeBackend)


def test_engine_that_changed_since_it_was_found_is_not_loaded(built):
    store = _store(built)
    records = store.find()
    before = _change(store.directory / "block_01.json")
    with pytest.raises(
        BundleError, match=r"part 'block_01': its engine, .*block_01.json, has SHA-256 .* builds it anew"
    ):
        store.load(FakeBackend(), records)
    (store.directory / "block_01.json").write_bytes(before)
    assert set(store.load(FakeBackend(), records)) == set(records)
    (store.directory / "block_01.json").unlink()
    with pytest.raises(BundleError, match=r"part 'block_01': its engine, .* cannot be read \(No such file"):
        store.load(FakeBackend(), records)

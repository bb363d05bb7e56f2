"""Opening a bundle for inference: what is built, what is kept, and what is refused."""

import hashlib
import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest

from bdtool.errors import BundleError, EngineError, UsageError
from bdtool.runtime.controllers import MaskController
from bdtool.runtime.loading import Loader
from bdtool.runtime.masks import MaskCount, write_masks
from bdtool.runtime.orchestrator import Orchestrator
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle


def test_unknown_strategy_backend_and_device_are_wrong_usage(tiny):
    with pytest.raises(UsageError, match=r"unknown strategy 'magic'; this version has chain, .*full"):
        Orchestrator.open(tiny.bundle, strategy="magic")
    with pytest.raises(UsageError, match="unknown backend 'openvino'"):
        Orchestrator.open(tiny.bundle, backend="openvino")
    with pytest.raises(UsageError, match="unknown device 0"):
        Orchestrator.open(tiny.bundle, device=0)
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        Orchestrator.open(tiny.bundle, device="gpu")


def test_cuda_is_the_first_gpu(bundle_copy):
    with Orchestrator.open(bundle_copy, backend="fake", device="cuda"):
        (directory,) = bundle_copy.glob("engines/fake-*")
    assert directory.name == "fake-1-cuda0-fp32"


def test_what_does_not_fit_is_refused_before_the_backend_is_opened(tiny, monkeypatch):
    monkeypatch.setattr("bdtool.runtime.opening.open_backend", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(UsageError, match="CUDA graph mode 'switch' runs on --backend torch, tensorrt, tensorrt-rtx wi"):
        Orchestrator.open(tiny.bundle, strategy="full", cuda_graph="switch")
    with pytest.raises(BundleError, match="has no int8 parts"):
        Orchestrator.open(tiny.bundle, precision="int8")


def _pixels(n):
    return np.zeros((n, 32, 32, 3), np.uint8)


def test_open_builds_what_is_missing_once(bundle_copy):
    with Orchestrator.open(bundle_copy, backend="fake") as runtime:
        runtime.run(_pixels(2))
    engines = {path.name: path.stat().st_mtime_ns for path in (bundle_copy / "engines" / "fake-1-cpu-fp32").iterdir()}
    assert len(engines) == 2 * len(Bundle.open(bundle_copy).network.parts)
    Orchestrator.open(str(bundle_copy), backend="fake").close()
    assert engines == {
        path.name: path.stat().st_mtime_ns for path in (bundle_copy / "engines" / "fake-1-cpu-fp32").iterdir()
    }


def test_moved_bundle_keeps_its_engines(bundle_copy, tmp_path):
    Orchestrator.open(bundle_copy, backend="fake").close()
    moved = shutil.move(bundle_copy, tmp_path / "moved")
    with Orchestrator.open(Bundle.open(moved), backend="fake") as runtime:
        assert runtime.run(_pixels(1)).logits.shape == (1, 10)


def test_damaged_bundle_does_not_open(bundle_copy):
    (bundle_copy / "onnx" / "block_01.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="part 'block_01'"):
        Orchestrator.open(bundle_copy, backend="fake")


def test_part_that_changed_after_the_bundle_was_opened_leaves_no_engine(bundle_copy, images_of):
    bundle = Bundle.open(bundle_copy)
    part = bundle_copy / "onnx" / "block_01.onnx"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"part 'block_01', onnx/block_01.onnx, has SHA-256"):
        Orchestrator.open(bundle, backend="fake")
    part.write_bytes(whole)
    Orchestrator.open(bundle, backend="fake").close()
    [record] = (bundle_copy / "engines").rglob("block_01.engine.json")
    assert json.loads(record.read_text())["onnx_sha256"] == bundle.part_sha256(bundle.network.part("block_01"))


def test_engine_is_hashed_once_when_a_bundle_is_opened(bundle_copy, monkeypatch):
    Orchestrator.open(bundle_copy, backend="fake").close()
    bundle, hashed = Bundle.open(bundle_copy), []
    real = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data=b"": hashed.append(data) or real(data))
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("a file was read for its digest alone"))
    Orchestrator.open(bundle, backend="fake").close()
    assert len(hashed) == 8  # all parts but `full`


def test_read_only_bundle_runs_and_is_left_as_it_is(bundle_copy, monkeypatch, caplog):
    real = os.access  # for root every place is writable, whatever its mode
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle_copy and real(path, mode))
    before = sorted(bundle_copy.rglob("*"))
    with Orchestrator.open(bundle_copy, backend="onnxruntime") as runtime:
        assert runtime.run(_pixels(3)).logits.shape == (3, 10)
    assert sorted(bundle_copy.rglob("*")) == before
    assert "is read-only and does not keep the engines onnxruntime-" in caplog.text
    assert "for this run only. Make it writable, or copy it, to keep them" in caplog.text


def test_masks_noted_in_a_read_only_bundle_serve_engines_that_are_built_elsewhere(bundle_copy, monkeypatch):
    """As of a bundle packed on a machine of another kind, whose engines it has not."""
    others = bundle_copy / "engines" / "fake-1-other-fp32"
    others.mkdir(parents=True)
    write_masks(others, [MaskCount(mask="101", share=0.5)], source="sample", policy="learned")
    real = os.access  # for root every place is writable, whatever its mode
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle_copy and real(path, mode))
    with Orchestrator.open(bundle_copy, backend="fake", strategy="path") as runtime:
        assert runtime.run(_pixels(1), policy="101").hits.tolist() == [True]


def test_engines_can_be_built_outside_the_bundle(bundle_copy, tmp_path, digests):
    bundle, backend = Bundle.open(bundle_copy), open_backend("fake", "cpu")
    store = EngineStore(bundle, identify_backend("fake", "cpu"))
    before = digests(bundle_copy)
    loader = Loader(bundle, store, backend, strategy="chain", build_in=tmp_path / "elsewhere")
    assert set(loader.load().engines) == {part.name for part in bundle.network.parts} - {"full"}
    assert loader.store.directory == tmp_path / "elsewhere" / "fake-1-cpu-fp32"
    assert digests(bundle_copy) == before
    store.build(lambda: backend)
    Loader(bundle, store, backend, strategy="chain", build_in=tmp_path / "unused").load()  # it has them itself by now
    assert not (tmp_path / "unused").exists()


def test_failing_build_names_the_first_part(bundle_copy, monkeypatch):
    from engines.fake import FakeBackend

    def build(self, part, model, *, layout):
        raise EngineError(f"part {part.name!r}: broken")

    monkeypatch.setattr(FakeBackend, "build", build)
    with pytest.raises(EngineError, match=r"9 fp32 engines did not build; the first: part 'policy': broken"):
        Orchestrator.open(bundle_copy, backend="fake")


def _in_a_fork(call):
    """Return what a call gives in a child of this process, or the error that it raises, as text."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(60)  # which ends one that waits for ever
        try:
            os.write(writer, str(call()).encode())
        except BaseException as exc:
            os.write(writer, repr(exc).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("backend", "strategy"), [("torch", "chain"), ("onnxruntime", "path")])
def test_fork_is_told_to_open_the_bundle_itself(tiny, backend, strategy):
    with Orchestrator.open(tiny.bundle, backend=backend, strategy=strategy) as runtime:
        expected = runtime.run(_pixels(2)).classes
        with runtime._turns.lock:  # as if another thread were running an image
            for use in (runtime.run, runtime.decide):
                assert "Open the bundle in each process" in _in_a_fork(lambda use=use: use(_pixels(2)))
            assert _in_a_fork(runtime.close) == "None"
        np.testing.assert_array_equal(runtime.run(_pixels(2)).classes, expected)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_uses_an_orchestrator_that_has_no_threads(fake, images_of):
    """Whatever another thread of the parent, which stays behind, was doing with it."""
    runtime = fake().runtime
    expected = str(runtime.run(images_of([1, 2])).classes)
    assert _in_a_fork(lambda: runtime.run(images_of([1, 2])).classes) == expected
    begun, done = threading.Event(), threading.Event()
    busy = threading.Thread(target=lambda: runtime.run_with(images_of([1]), _Waiting(begun, done)))
    busy.start()
    begun.wait()
    assert _in_a_fork(lambda: runtime.run(images_of([1, 2])).classes) == expected
    assert _in_a_fork(runtime.close) == "None"
    done.set()
    busy.join()
    assert str(runtime.run(images_of([1, 2])).classes) == expected


class _Waiting(MaskController):
    """Keeps every block, once it is told to go on."""

    def __init__(self, begun, done):
        super().__init__(np.ones((1, 6), bool), threshold=0.5)
        self._begun, self._done = begun, done

    def begin(self, n_images, probabilities):
        super().begin(n_images, probabilities)
        self._begun.set()
        self._done.wait()

"""Images as pixels and preprocessed, on backends whose engines normalise: the same logits, each through its engines."""

import os
from dataclasses import replace

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.data.sources import open_data
from bdtool.errors import DataError
from bdtool.runtime.loading import Loader
from bdtool.runtime.place import Place
from bdtool.runtime.preprocess import Preprocessor, preprocess
from bdtool.verification.ladder import verify
from engines.fake import FakeBackend
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle
from tests.fake_tensorrt import FakeTensorRT, install_gpu

KEEP = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=bool)
TENSORRT = {"backend": "tensorrt", "device": "cuda:0"}


@pytest.fixture
def driver(monkeypatch, tmp_path):
    return install_gpu(monkeypatch, tmp_path / "cache")


def _torch_of_pixels(path, strategy, precision="fp32"):
    """Open the torch backend as on a GPU, whose engines take pixels, on the CPU."""
    bundle = Bundle.open(path)
    identity = replace(identify_backend("torch", "cpu"), takes_pixels=True)
    backend = open_backend("torch", "cpu")
    loader = Loader(bundle, EngineStore(bundle, identity, precision=precision), backend, strategy=strategy)
    loaded = loader.load()
    options = {"strategy": strategy, "max_batch": 2, "preprocessed": loader.load_preprocessed}
    return Orchestrator(loaded.network, backend, loaded.engines, **options)


@pytest.mark.parametrize("strategy", ["chain", "path"])
def test_torch_gives_pytorchs_logits_for_both_forms(bundle_copy, tiny, pixels, torch_logits, strategy):
    images = pixels(tiny.model, len(KEEP))
    ready = preprocess(images, tiny.model.spec.preprocessing)
    expected = torch_logits(tiny.model, ready, KEEP)
    with _torch_of_pixels(bundle_copy, strategy) as runtime:
        for given in (images, ready, images[::-1][::-1]):
            np.testing.assert_allclose(runtime.run(given, policy=KEEP).logits, expected, atol=1e-4)
        stats = runtime.path_stats
        if stats is not None:  # of the images of both forms
            assert stats.hits + stats.misses == 3 * len(KEEP)
        learned = runtime.run(images)
    np.testing.assert_allclose(learned.logits, torch_logits(tiny.model, ready, learned.policy), atol=1e-4)


def test_torch_runs_pixels_in_half_precision(bundle_copy, tiny, pixels, preprocessed, torch_logits):
    with _torch_of_pixels(bundle_copy, "chain", "fp16") as runtime:
        logits = runtime.run(pixels(tiny.model, 2), policy="101").logits
    expected = torch_logits(tiny.model, preprocessed(tiny.model, 2), KEEP[[0, 0]])
    np.testing.assert_allclose(logits, expected, atol=0.05)


def test_keep_probabilities_are_those_of_pytorch(driver, tiny, bundle_copy, pixels, preprocessed):
    import torch

    images, ready = pixels(tiny.model, 3), preprocessed(tiny.model, 3)
    with torch.inference_mode():
        expected = tiny.model.keep_probability(torch.from_numpy(ready)).numpy()
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        for given in (images, ready):
            np.testing.assert_allclose(runtime.keep_probability(given), expected, atol=1e-4)
            assert np.array_equal(runtime.decide(given), expected >= 0.5)


@pytest.mark.parametrize("strategy", ["chain", "graph", "full"])
def test_quarter_of_the_bytes_goes_to_the_device_once(driver, tiny, bundle_copy, pixels, strategy):
    image, copied = pixels(tiny.model, 1), []
    policy = None if strategy == "full" else "101"
    with Orchestrator.open(bundle_copy, strategy=strategy, **TENSORRT) as runtime:
        runtime.run(image, policy=policy)
        upload = driver.cuMemcpyHtoDAsync
        driver.cuMemcpyHtoDAsync = lambda *arguments: copied.append(arguments[2]) or upload(*arguments)
        runtime.run(image, policy=policy)
    assert [n_bytes for n_bytes in copied if n_bytes > 3] == [32 * 32 * 3]  # besides the three keep bits of `graph`


def test_host_computes_nothing_of_pixels(driver, tiny, bundle_copy, pixels, monkeypatch):
    images = pixels(tiny.model, 2)

    def fail(self, images, out):
        raise AssertionError("normalised on the host")

    monkeypatch.setattr(Preprocessor, "_normalize", fail)
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        assert runtime.prepare(images) is images
        assert runtime.run(images).logits.shape == (2, 10)


def test_preprocessed_images_have_engines_of_their_own(driver, tiny, bundle_copy, pixels, preprocessed):
    def files():
        return sorted(path.name for path in (bundle_copy / "engines").rglob("*.plan"))

    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        runtime.run(pixels(tiny.model, 1))
        assert [name for name in files() if ".pixels" in name] == [
            f"{n}.pixels.plan" for n in ("full", "policy", "stem")
        ]
        assert "stem.plan" not in files()
        runtime.run(preprocessed(tiny.model, 1))
        both = files()
        assert {"policy.plan", "stem.plan"} <= set(both)
        assert "full.plan" not in both  # this strategy does not run it
    built = {path: path.stat().st_mtime_ns for path in (bundle_copy / "engines").rglob("*.plan")}
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        runtime.run(pixels(tiny.model, 1))
        contexts = FakeTensorRT.notes["contexts"]
        runtime.run(preprocessed(tiny.model, 1))
        runtime.keep_probability(preprocessed(tiny.model, 1))
        assert FakeTensorRT.notes["contexts"] == contexts + 2  # of stem and policy; the other engines are shared
    assert built == {path: path.stat().st_mtime_ns for path in (bundle_copy / "engines").rglob("*.plan")}


def test_another_normalisation_is_another_engine(driver, bundle_copy):
    """It is in no ONNX part: the manifest alone has it, and only the engines that normalise depend on it."""
    import json

    Orchestrator.open(bundle_copy, **TENSORRT).close()
    store = EngineStore(Bundle.open(bundle_copy), identify_backend("tensorrt", "cuda:0"))
    assert len(store.find()) == 9
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["preprocessing"]["mean"] = [0.1, 0.2, 0.3]
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    changed = EngineStore(Bundle.open(bundle_copy), identify_backend("tensorrt", "cuda:0"))
    assert set(store.find()) - set(changed.find()) == {"policy", "stem", "full"}


def test_read_only_bundle_runs_both_forms_and_is_left_as_it_is(
    driver, tiny, bundle_copy, pixels, preprocessed, monkeypatch
):
    real = os.access  # for root every place is writable, whatever its mode
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle_copy and real(path, mode))
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        both = [runtime.run(form(tiny.model, 2), policy="101").logits for form in (pixels, preprocessed)]
    np.testing.assert_allclose(*both, atol=1e-5)
    assert not (bundle_copy / "engines").exists()


def test_ladder_holds_on_engines_that_take_pixels(driver, bundle_copy):
    bundle = Bundle.open(bundle_copy)
    data = open_data("synthetic:12", network=bundle.network)
    result = verify(bundle, data, Place(**TENSORRT))
    assert [rung.name for rung in result.rungs if not rung.ok] == []


def test_ladder_sees_another_normalisation(driver, bundle_copy, monkeypatch):
    monkeypatch.setattr("bdtool.specs.Preprocessing.offset", property(lambda self: (0.5, 0.5, 0.5)))
    Orchestrator.open(bundle_copy, **TENSORRT).close()
    monkeypatch.undo()
    install_gpu(monkeypatch, bundle_copy.parent)
    bundle = Bundle.open(bundle_copy)
    result = verify(bundle, open_data("synthetic:12", network=bundle.network), Place(**TENSORRT))
    assert "engines" in [rung.name for rung in result.rungs if not rung.ok]


def test_wrong_images_are_refused_before_anything_runs(driver, tiny, bundle_copy):
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        with pytest.raises(DataError, match=r"got uint8 \[1, 16, 16, 3\], expected uint8 \[N, 32, 32, 3\] or prep"):
            runtime.run(np.zeros((1, 16, 16, 3), np.uint8))
        with pytest.raises(DataError, match="expected at least one image"):
            runtime.run(np.zeros((0, 32, 32, 3), np.uint8))


def test_engines_given_by_hand_say_that_they_take_pixels(tiny_network_of_pixels):
    with pytest.raises(DataError, match=r"got preprocessed float32, these engines take pixels\. Pass uint8"):
        tiny_network_of_pixels.run(np.zeros((1, 3, 32, 32), np.float32))


@pytest.fixture
def tiny_network_of_pixels(tiny):
    network, backend = Bundle.open(tiny.bundle).network.with_pixels(), FakeBackend()
    engines = {part.name: backend.load(part, b"{}", layout="NCHW") for part in network.parts}
    with Orchestrator(network, backend, engines, strategy="chain", max_batch=2) as runtime:
        yield runtime

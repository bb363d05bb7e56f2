"""Which stored TensorRT engines are run, and which are refused or built again."""

import json

import pytest

from bdtool import Orchestrator
from bdtool.errors import EngineError
from engines.libcuda import Driver, Gpu
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from engines.trt_options import TensorRTOptions
from export.bundle import Bundle
from tests.fake_tensorrt import build_engines, install_gpu

TENSORRT = {"backend": "tensorrt", "device": "cuda:0"}


@pytest.fixture
def driver(monkeypatch, tmp_path):
    return install_gpu(monkeypatch, tmp_path / "cache")


def test_record_says_whether_an_engine_can_be_loaded(driver, bundle_copy):
    for strip, loadable in ((True, False), (False, True)):
        store = build_engines(bundle_copy, strip_weights=strip)
        assert json.loads((store.directory / "head.engine.json").read_bytes())["loadable"] is loadable


@pytest.mark.parametrize("recipe", [1, 99])
def test_engines_that_another_version_built_otherwise_are_built_again(driver, bundle_copy, recipe):
    store = build_engines(bundle_copy, max_batch=4)
    for path in store.directory.glob("*.engine.json"):
        record = json.loads(path.read_text())
        settings = {**json.loads(record["settings"]), "recipe": recipe}
        path.write_text(json.dumps({**record, "settings": json.dumps(settings)}))
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        assert runtime.max_batch == Bundle.open(bundle_copy).manifest.max_batch != 4


def test_version_compatible_engines_are_loaded_where_they_were_asked_for(driver, bundle_copy, pixels, tiny):
    build_engines(bundle_copy, version_compatible=True)
    with Orchestrator.open(bundle_copy, backend="tensorrt", device="cuda:0") as runtime:
        assert runtime.run(pixels(tiny.model, 1)).logits.shape == (1, 10)


def test_version_compatible_engines_are_loaded_beside_others(driver, bundle_copy, pixels, tiny):
    build_engines(bundle_copy, version_compatible=True)
    options = TensorRTOptions()
    others = EngineStore(Bundle.open(bundle_copy), identify_backend("tensorrt", "cuda:0", tensorrt=options))
    others.build(lambda: open_backend("tensorrt", "cuda:0", tensorrt=options), parts=[others.network.require("head")])
    with Orchestrator.open(bundle_copy, **TENSORRT) as runtime:
        assert runtime.run(pixels(tiny.model, 1)).logits.shape == (1, 10)


def test_host_code_of_other_engines_is_refused(driver, bundle_copy):
    store = build_engines(bundle_copy, version_compatible=True)
    for path in store.directory.glob("*.engine.json"):
        record = json.loads(path.read_bytes())
        path.write_text(json.dumps({**record, "settings": TensorRTOptions().settings}))
    with pytest.raises(EngineError, match=r"cannot load its engine: IRuntime::getEngineHostCodeAllowed\(\) is false"):
        Orchestrator.open(bundle_copy, backend="tensorrt", device="cuda:0")


@pytest.mark.parametrize(
    ("level", "other", "serves"),
    [
        ("none", "NVIDIA H100", False),  # another model of the same capability
        ("same-compute-capability", "NVIDIA H100", True),
        ("ampere-plus", "NVIDIA H100", True),
    ],
)
def test_engines_serve_another_gpu_if_they_were_built_for_it(monkeypatch, driver, bundle_copy, level, other, serves):
    built = build_engines(bundle_copy, hardware_compatibility=level)
    found = Driver((13, 0), (Gpu(other, (9, 0)),))
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: found)
    store = EngineStore(Bundle.open(bundle_copy), identify_backend("tensorrt", "cuda:0"))
    serving = store.find_complete(store.network.parts)
    assert (serving is not None and serving[0].directory == built.directory) == serves


def test_engines_for_ampere_and_later_do_not_serve_turing(monkeypatch, driver, bundle_copy):
    build_engines(bundle_copy, hardware_compatibility="ampere-plus")
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: Driver((13, 0), (Gpu("NVIDIA T4", (7, 5)),)))
    store = EngineStore(Bundle.open(bundle_copy), identify_backend("tensorrt", "cuda:0"))
    assert store.find_complete(store.network.parts) is None


def test_engine_without_weights_is_not_run(driver, bundle_copy):
    options = TensorRTOptions(strip_weights=True)
    store = EngineStore(Bundle.open(bundle_copy), identify_backend("tensorrt", "cuda:0", tensorrt=options))
    store.build(lambda: open_backend("tensorrt", "cuda:0", tensorrt=options))
    with pytest.raises(EngineError, match=r"built without weights.*again without --strip-weights"):
        Orchestrator.open(bundle_copy, **TENSORRT)


def _record(store, name):
    return json.loads((store.directory / f"{name}.engine.json").read_bytes())


def test_engine_that_went_is_built_for_the_batches_of_the_others(driver, bundle_copy):
    store = build_engines(bundle_copy, min_batch=2, opt_batch=3, max_batch=4)
    (store.directory / "head.plan").unlink()
    Orchestrator.open(bundle_copy, **TENSORRT).close()
    assert _record(store, "head")["settings"] == store.settings


def test_engine_that_went_from_among_different_ones_is_built_as_by_default(driver, bundle_copy):
    store = build_engines(bundle_copy, max_batch=4)
    record = {**_record(store, "block_00"), "settings": TensorRTOptions(max_batch=5).settings}
    (store.directory / "block_00.engine.json").write_text(json.dumps(record))
    (store.directory / "head.plan").unlink()
    Orchestrator.open(bundle_copy, **TENSORRT).close()
    max_batch = Bundle.open(bundle_copy).manifest.max_batch
    assert _record(store, "head")["settings"] == TensorRTOptions(max_batch=max_batch).settings

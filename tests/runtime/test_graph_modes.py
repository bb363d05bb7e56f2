"""The modes of strategy `graph`: all of them compute the same, and what each one does. On stand-ins."""

import gc
import itertools

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.errors import EngineError
from bdtool.runtime.path_cache import PathOptions
from tests.fake_tensorrt import FakeTensorRT, install_gpu

MODES = ("policy-cache", "switch", "path-cache", "off")  # of a new driver
ALL_MASKS = [np.array(bits, dtype=bool) for bits in itertools.product((False, True), repeat=3)]
SOME = PathOptions(ahead=[ALL_MASKS[5], ALL_MASKS[3]])


@pytest.fixture
def driver(monkeypatch, tmp_path):
    return install_gpu(monkeypatch, tmp_path)


def _open(bundle, **options):
    return Orchestrator.open(bundle, backend="tensorrt", device="cuda:0", strategy="graph", **options)


# --- all modes compute the same ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mask_runs_what_pytorch_runs(driver, tiny, preprocessed, torch_logits, mode):
    images, keep = preprocessed(tiny.model, 8), np.array(ALL_MASKS)
    with _open(tiny.bundle, cuda_graph=mode, paths=SOME) as runtime:
        together = runtime.run(images, policy=keep)
        alone = np.concatenate([runtime.run(images[i : i + 1], policy=keep[i]).logits for i in range(8)])
        assert (runtime.graph_choice.mode, runtime.graph_choice.reason) == (mode, "asked for")
    expected = torch_logits(tiny.model, images, keep)
    np.testing.assert_array_equal(together.policy, keep)
    np.testing.assert_allclose(together.logits, expected, atol=1e-4)
    np.testing.assert_allclose(alone, expected, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_learned_policy_decides_as_the_chain(driver, tiny, preprocessed, mode):
    images = preprocessed(tiny.model, 16)
    with Orchestrator.open(tiny.bundle, backend="tensorrt", device="cuda:0") as chain:
        expected = chain.run(images)
    with _open(tiny.bundle, cuda_graph=mode, paths=SOME) as runtime:
        result = runtime.run(images)
        with_cost = runtime.run_with_policy_cost(images, expected.policy)
    assert len(np.unique(result.policy, axis=0)) > 1
    for one in (result, with_cost):
        np.testing.assert_array_equal(one.policy, expected.policy)
        np.testing.assert_allclose(one.logits, expected.logits, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_probability_that_is_not_finite_is_refused(driver, tiny, mode):
    with _open(tiny.bundle, cuda_graph=mode, paths=SOME) as runtime, pytest.raises(EngineError, match="not finite"):
        runtime.run(np.full((1, 3, 32, 32), np.nan, np.float32))


@pytest.mark.parametrize("mode", MODES)
def test_network_without_a_policy_runs_given_bits(driver, export_random, preprocessed, torch_logits, mode):
    exported = export_random("resnet14", has_policy=False)
    images = preprocessed(exported.model, 2)
    keep = np.array([[1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=bool)
    with _open(exported.bundle, cuda_graph=mode, paths=PathOptions(ahead=[keep[0]])) as runtime:
        logits = runtime.run(images, policy=keep).logits
        np.testing.assert_array_equal(runtime.run(images).policy, np.ones((2, 6)))
    np.testing.assert_allclose(logits, torch_logits(exported.model, images, keep), atol=1e-4)


# --- what a mode does -------------------------------------------------------------------------------------------------


def test_policy_cache_takes_one_switch_for_a_frequent_mask_and_all_for_others(driver, tiny, preprocessed):
    driver.conditional_ms = 1000
    image = preprocessed(tiny.model, 1)
    with _open(tiny.bundle, cuda_graph="policy-cache", paths=SOME) as runtime:
        runtime.run(image)  # its graphs are made for such images
        launched, switches, hits = len(driver.launched), [], []
        for mask in (ALL_MASKS[5], ALL_MASKS[0]):
            before = driver.time_ms
            hits += runtime.run(image, policy=mask).hits.tolist()
            switches.append(int(driver.time_ms - before) // 1000)
        assert len(driver.launched) == launched + 2  # one an image
    assert switches == [1, 1 + 1]  # a miss: one more, of all three blocks and the head, within the last body
    assert hits == [True, False]


# 101 and 100 run block 0 and the shortcut of block 1 first; 011 begins otherwise
COUNTED = PathOptions(ahead=[ALL_MASKS[5], ALL_MASKS[4], ALL_MASKS[3]], shares=[0.5, 0.3, 0.1])


@pytest.mark.parametrize("last_first", [False, True])
def test_images_run_what_pytorch_runs_behind_a_speculation(driver, tiny, preprocessed, torch_logits, last_first):
    FakeTensorRT.notes["ms"] = {"keep_probability": 4}  # in which the device runs the stem and three parts
    driver.last_first = last_first  # what runs beside something else may run before it, or after
    images, keep = preprocessed(tiny.model, 8), np.array(ALL_MASKS)
    with _open(tiny.bundle, cuda_graph="policy-cache", paths=COUNTED) as runtime:
        result, learned = runtime.run(images, policy=keep), runtime.run(images)
        assert ": the 2 parts that 80 % of the images begin with" in runtime.graph_choice.reason
    np.testing.assert_allclose(result.logits, torch_logits(tiny.model, images, keep), atol=1e-4)
    np.testing.assert_allclose(learned.logits, torch_logits(tiny.model, images, learned.policy), atol=1e-4)


def test_right_speculation_saves_its_parts_and_a_wrong_one_costs_a_stem(driver, tiny, preprocessed):
    image = preprocessed(tiny.model, 1)

    def times(paths):
        with _open(tiny.bundle, cuda_graph="policy-cache", paths=paths) as runtime:
            runtime.run(image)
            for mask in (ALL_MASKS[5], ALL_MASKS[4], ALL_MASKS[3], ALL_MASKS[7]):
                before = driver.time_ms
                runtime.run(image, policy=mask)
                yield driver.time_ms - before

    FakeTensorRT.notes["ms"] = {"keep_probability": 4}
    nothing = PathOptions(ahead=COUNTED.ahead, shares=[0, 0, 0])
    assert list(times(nothing)) == [4 + 3 + 1, 4 + 3 + 1, 4 + 2 + 1, 4 + 3 + 1]  # policy network, blocks, head
    assert list(times(COUNTED)) == [4 + 1 + 1, 4 + 1 + 1, 4 + 1 + 2 + 1, 4 + 1 + 3 + 1]


def test_no_speculation_where_the_policy_hides_nothing_or_is_not_there(driver, tiny, export_random):
    without = export_random("resnet8", has_policy=False)
    for bundle, ms in ((tiny.bundle, 0.5), (without.bundle, 4)):
        FakeTensorRT.notes["ms"] = {"keep_probability": ms}
        with _open(bundle, cuda_graph="policy-cache", paths=COUNTED) as runtime:
            assert runtime.graph_choice.reason == "asked for"


def test_speculation_is_found_anew_for_other_masks(driver, tiny):
    FakeTensorRT.notes["ms"] = {"keep_probability": 4}
    others = PathOptions(ahead=[ALL_MASKS[3]])
    with _open(tiny.bundle, cuda_graph="policy-cache", paths=COUNTED) as runtime:
        begun = runtime.graph_choice.speculation.runs
        assert begun[0].block == 0
        for paths, expected in ((None, 0), (COUNTED, 0), (others, 1)):  # 011 drops block 0, which has no shortcut
            with runtime.timed(lambda part, call: call, paths=paths) as other:
                found = other.graph_choice.speculation
                assert (found.runs[0].block, found.runs == begun) == (expected, expected == 0)


def test_path_cache_is_one_small_read_and_one_launch_after_the_policys(driver, tiny, preprocessed):
    image = preprocessed(tiny.model, 1)
    with _open(tiny.bundle, cuda_graph="path-cache") as runtime:
        first = runtime.run(image)
        driver.copies.clear()
        launched, enqueued = len(driver.launched), FakeTensorRT.notes["enqueued"]
        again = runtime.run(image)
        assert driver.copies == ["HtoD", "DtoH", "DtoH"]  # image in; probabilities and logits out
        assert len(driver.launched) == launched + 2
        assert FakeTensorRT.notes["enqueued"] == enqueued  # nothing is captured again
    assert (first.hits.tolist(), again.hits.tolist()) == ([False], [True])


def test_path_cache_is_bounded_and_drops_the_least_recently_used(driver, tiny, preprocessed):
    image = preprocessed(tiny.model, 1)
    options = PathOptions(max_paths=2, ahead=[ALL_MASKS[1], ALL_MASKS[2], ALL_MASKS[3]])
    with _open(tiny.bundle, cuda_graph="path-cache", paths=options) as runtime:
        assert len(driver.ended) == 0
        hits = [bool(runtime.run(image, policy=ALL_MASKS[k]).hits[0]) for k in (1, 2, 1, 4, 2, 1)]
        gc.collect()
        assert hits == [True, True, True, False, False, False]  # 4 drops 2, 2 drops 1, 1 drops 4
        assert len(driver.ended) == 3


@pytest.mark.parametrize("mode", MODES)
def test_closing_gives_everything_back(driver, tiny, preprocessed, mode):
    with _open(tiny.bundle, cuda_graph=mode, paths=SOME) as runtime:
        runtime.run(preprocessed(tiny.model, 2))
    del runtime
    gc.collect()
    captured_or_made = set(driver.graphs) - _bodies(driver)
    assert captured_or_made == set(driver.destroyed)
    assert sorted(driver.ended) == sorted(driver.instantiated)
    assert (driver.memory, driver.host_memory) == ({}, {})
    made_and_gone = (("cuStreamCreate", "cuStreamDestroy"), ("cuModuleLoadData", "cuModuleUnload"))
    assert [driver.calls[made] - driver.calls[gone] for made, gone in made_and_gone] == [0, 0]
    assert driver.calls["cuModuleLoadData"] == (mode in ("policy-cache", "switch"))


def _bodies(driver):
    """Return the graphs that belong to a conditional node and go with it."""
    conditionals = [entry for nodes in driver.graphs.values() for entry, _ in nodes if entry[0] == "switch"]
    return {body for _, _, bodies in conditionals for body in bodies}


@pytest.mark.parametrize("call", ["cuGraphInstantiateWithParams", "cuGraphAddNode"])
def test_graph_that_is_refused_halfway_is_given_back(driver, tiny, call):
    driver.failing = call
    with pytest.raises(EngineError, match="CUDA_ERROR_INVALID_VALUE"):
        _open(tiny.bundle, cuda_graph="switch")
    gc.collect()
    assert set(driver.graphs) - _bodies(driver) == set(driver.destroyed)

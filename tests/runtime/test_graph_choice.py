"""Which mode strategy `graph` takes, and why: what there is, and what was measured to be the fastest. On stand-ins."""

import re

import numpy as np
import pytest

from bdtool import Orchestrator
from bdtool.cli import main
from bdtool.errors import BackendError, EngineError, UsageError
from bdtool.runtime.factory import strategies_for
from bdtool.runtime.path_cache import PathOptions
from engines.graph_modes import GRAPH_MODES, GraphPlan, graphs_of_machine, plan_for
from engines.libcuda import Driver, Gpu
from tests.fake_tensorrt import FakeTensorRT, install_gpu

MODES = ("policy-cache", "switch", "path-cache", "off")  # of a new driver
MASKS = [np.array(bits, dtype=bool) for bits in ((1, 0, 1), (1, 0, 0), (0, 1, 1))]
SOME = PathOptions(ahead=[MASKS[0], MASKS[2]])
COUNTED = PathOptions(ahead=MASKS, shares=[0.5, 0.3, 0.1])


@pytest.fixture
def driver(monkeypatch, tmp_path):
    return install_gpu(monkeypatch, tmp_path)


def _open(bundle, **options):
    return Orchestrator.open(bundle, backend="tensorrt", device="cuda:0", strategy="graph", **options)


def test_modes_are_compared_on_masks_as_frequent_as_noted(driver, tiny):
    FakeTensorRT.notes["ms"] = {"keep_probability": 4}
    with _open(tiny.bundle, paths=COUNTED) as runtime:
        measured = runtime.graph_choice.measured_ms
    # of ten images 5 or 6 have the first mask, 3 the second, 1 the third; a tenth has one of the five others
    other = 1 + (2 + 2 + 2 + 3 + 3) / 5 + 1  # stem, blocks or their shortcuts, head
    known = (9 * (1 + 3 + 1) + 1 * (1 + 2 + 1)) / 10
    assert measured["path-cache"] == pytest.approx(4 + 0.9 * known + 0.1 * other)
    begun = (9 * (1 + 1) + 1 * (1 + 2 + 1)) / 10
    assert measured["policy-cache"] == pytest.approx(4 + 0.9 * begun + 0.1 * other)


def test_masks_can_be_one_array(driver, tiny):
    """As `runtime.decide` gives them."""
    with _open(tiny.bundle, cuda_graph="policy-cache", paths=PathOptions(ahead=np.array(MASKS))) as runtime:
        assert runtime.run(np.zeros((1, 32, 32, 3), np.uint8), policy=MASKS[1]).hits.tolist() == [True]


def test_modes_are_compared_without_a_copy_of_given_bits(driver, tiny):
    """An image whose policy is learned has none: to the device goes the image alone, in every mode."""
    driver.copy_ms["HtoD"] = 1000
    with _open(tiny.bundle, paths=SOME) as runtime:
        measured = runtime.graph_choice.measured_ms
    assert {mode: ms // 1000 for mode, ms in measured.items()} == dict.fromkeys(MODES, 1)


def test_masks_never_seen_count_as_often_as_they_come(driver, tiny):
    """Of the tiny network's eight masks three are known, so the others are soon seen, too."""
    driver.instantiate_ms = 1000
    with _open(tiny.bundle, paths=COUNTED) as runtime:
        assert "the fastest here, 10% of the images with a mask never seen" in runtime.graph_choice.reason
        assert max(runtime.graph_choice.measured_ms.values()) < 100


@pytest.mark.parametrize(("instantiate_ms", "fastest"), [(0, "path-cache"), (100, "switch")])
def test_where_no_masks_are_known_each_is_a_new_one(driver, export_random, instantiate_ms, fastest):
    """A host path cache builds a graph for each; as often as it hits what it has, it is ahead of `switch` here."""
    driver.launch_ms, driver.conditional_ms, driver.instantiate_ms = 1, 2, instantiate_ms
    with _open(export_random("resnet20").bundle) as runtime:
        assert runtime.graph_choice.mode == fastest
        assert "100% of the images with a mask never seen" in runtime.graph_choice.reason
        measured = runtime.graph_choice.measured_ms
    assert measured["path-cache"] - instantiate_ms == pytest.approx(measured["off"], abs=15)


def test_comparing_leaves_the_path_cache_with_the_frequent_masks(driver, export_random, preprocessed):
    driver.conditional_ms = 1000
    exported = export_random("resnet20")
    frequent = np.random.default_rng(1).random((3, 9)) < 0.5
    paths = PathOptions(ahead=list(frequent), shares=[0.3, 0.2, 0.1], max_paths=3)
    with _open(exported.bundle, paths=paths) as runtime:
        assert runtime.graph_choice.mode == "path-cache"
        result = runtime.run(preprocessed(exported.model, 3), policy=frequent)
    assert result.hits.tolist() == [True] * 3


@pytest.mark.parametrize(
    ("conditional_ms", "read_ms", "launch_ms", "fastest"),
    [
        (0.1, 5, 1, "policy-cache"),
        (0, 5, 1, "policy-cache"),  # as fast as `switch`: the first in order
        (9, 0.1, 0.1, "path-cache"),
        (9, 0.1, 0, "path-cache"),
    ],
)
def test_fastest_mode_is_measured_when_the_bundle_is_opened(driver, tiny, conditional_ms, read_ms, launch_ms, fastest):
    driver.conditional_ms, driver.launch_ms = conditional_ms, launch_ms
    driver.copy_ms["DtoH"] = read_ms
    with _open(tiny.bundle, paths=SOME) as runtime:
        choice = runtime.graph_choice
        assert choice.mode == fastest
        assert set(choice.measured_ms) == set(MODES)
        assert choice.measured_ms[fastest] == min(choice.measured_ms.values())
        assert choice.reason.startswith("the fastest here, 0% of the images with a mask never seen: policy-cache ")
        launched = len(driver.launched)
        with runtime.timed(lambda part, call: call) as other:  # a profile's: nothing is compared again
            assert other.graph_choice.mode == fastest
            assert len(driver.launched) == launched


def test_without_frequent_masks_the_reason_says_how_to_note_some(driver, tiny):
    with _open(tiny.bundle) as runtime:
        assert runtime.graph_choice.mode == "switch"
        assert "not policy-cache: no frequent masks are known; note some with" in runtime.graph_choice.reason
    with pytest.raises(UsageError, match=r"'policy-cache': no frequent masks are known.*PathOptions"):
        _open(tiny.bundle, cuda_graph="policy-cache")


CUDA_12 = {"cuda-bindings": "12.9.4", "nvidia-cuda-nvrtc-cu12": "12.9.86"}
CUDA_13 = {"cuda-bindings": "13.5.0", "nvidia-cuda-nvrtc": "13.2.86"}


@pytest.mark.parametrize(
    ("cuda", "packages", "modes", "reason"),
    [
        ((12, 8), CUDA_12, MODES, "the fastest here"),
        ((12, 4), CUDA_12, ("path-cache", "off"), "supports CUDA up to 12.4, a SWITCH in a CUDA graph needs 12.8"),
        ((11, 8), CUDA_12, ("off",), "supports CUDA up to 11.8, a CUDA graph needs 12.0"),
        # machine code of a newer major version does not load
        (
            (12, 9),
            CUDA_13,
            ("path-cache", "off"),
            "cuda-bindings 13.5.0 compiles for CUDA 13; add it with: pip install",
        ),
    ],
)
def test_older_driver_falls_back_and_says_why(driver, monkeypatch, tiny, preprocessed, cuda, packages, modes, reason):
    old = Driver(cuda, (Gpu("A", (8, 0)),))
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: old)
    monkeypatch.setattr("engines.registry.installed_version", packages.get)
    with _open(tiny.bundle, paths=SOME) as runtime:
        assert runtime.graph_choice.mode == modes[0]
        assert reason in runtime.graph_choice.reason
        assert tuple(runtime.graph_choice.measured_ms) in (modes, ())
        assert runtime.run(preprocessed(tiny.model, 1)).logits.shape == (1, 10)
    assert ("graph" in strategies_for("tensorrt", "cuda:0")) == (modes[0] != "off")  # else it would be the chain
    if "switch" not in modes:
        with pytest.raises(BackendError, match=r"mode 'switch': .*\. Or use one that is there: "):
            _open(tiny.bundle, cuda_graph="switch")


NEW = Driver((13, 0), (Gpu("NVIDIA H200", (9, 0)),))


@pytest.mark.parametrize(
    ("packages", "modes", "words"),
    [
        (CUDA_13, MODES, None),
        (CUDA_12, MODES, None),  # machine code of an older major version loads
        ({"cuda-bindings": "13.5.0"}, ("path-cache", "off"), "a SWITCH in a CUDA graph needs nvidia-cuda-nvrtc; add"),
        ({"cuda-bindings": "12.9.4"}, ("path-cache", "off"), "a SWITCH in a CUDA graph needs nvidia-cuda-nvrtc-cu12"),
        (
            {},
            ("off",),
            'a SWITCH in a CUDA graph needs cuda-bindings; add it with: pip install "cuda-b',
        ),
    ],
)
def test_missing_packages_leave_less(packages, modes, words):
    plan = graphs_of_machine(NEW, packages.get)
    assert plan.modes == modes
    assert set(plan.missing) == set(MODES) - set(modes)
    assert words is None or plan.missing["switch"].startswith(words)


def _refused_by(driver, monkeypatch, what):
    if what == "a part cannot be captured":
        kinds, capture = driver.kinds, driver.cuStreamEndCapture

        def with_event(stream):
            status, graph = capture(stream)
            kinds[int(graph)] = ["KERNEL", "EVENT_RECORD"]
            return status, graph

        monkeypatch.setattr(driver, "cuStreamEndCapture", with_event, raising=False)
    else:
        monkeypatch.setattr("engines.network_graphs.cubin_from_source", _too_old)


def _too_old(source, sm):
    raise BackendError("NVRTC is too old for sm_90")


@pytest.mark.parametrize("what", ["a part cannot be captured", "the kernels do not compile"])
def test_mode_that_fails_is_left_out_and_the_reason_given(driver, monkeypatch, tiny, preprocessed, torch_logits, what):
    _refused_by(driver, monkeypatch, what)
    images, keep = preprocessed(tiny.model, 2), np.array(MASKS[:2])
    with _open(tiny.bundle, paths=SOME) as runtime:
        logits = runtime.run(images, policy=keep).logits
        choice = runtime.graph_choice
    assert choice.mode in ("path-cache", "off")
    assert not {"policy-cache", "switch"} & set(choice.measured_ms)
    assert ("EVENT_RECORD" if "captured" in what else "NVRTC is too old") in choice.reason
    np.testing.assert_allclose(logits, torch_logits(tiny.model, images, keep), atol=1e-4)
    with pytest.raises((EngineError, BackendError), match=r"EVENT_RECORD|NVRTC is too old"):
        _open(tiny.bundle, cuda_graph="switch")


def test_mode_whose_graph_does_not_start_is_left_out(driver, tiny, preprocessed, torch_logits):
    """As where the GPU has memory to build a graph, and none to run it."""
    images, keep = preprocessed(tiny.model, 2), np.array(MASKS[:2])
    driver.failing = "cuGraphLaunch"
    with _open(tiny.bundle, paths=SOME) as runtime:
        logits = runtime.run(images, policy=keep).logits
        choice = runtime.graph_choice
    assert (choice.mode, choice.reason.count("not switch: the CUDA driver refuses a graph launch")) == ("off", 1)
    np.testing.assert_allclose(logits, torch_logits(tiny.model, images, keep), atol=1e-4)
    with pytest.raises(EngineError, match="refuses a graph launch"):
        _open(tiny.bundle, cuda_graph="switch").run(images, policy=keep)


def test_network_of_many_blocks_takes_the_modes_that_need_no_kernel(driver, monkeypatch, tiny):
    monkeypatch.setattr("bdtool.runtime.graph.MAX_BLOCKS", 2)
    with _open(tiny.bundle, paths=SOME) as runtime:
        assert set(runtime.graph_choice.measured_ms) == {"path-cache", "off"}
        assert "its kernel decides on at most 2 blocks, and this network has 3" in runtime.graph_choice.reason
    with pytest.raises(UsageError, match="mode 'switch': its kernel decides on at most 2 blocks"):
        _open(tiny.bundle, cuda_graph="switch")


def test_help_names_the_modes_that_there_are():
    [option] = [param for param in main.commands["profile"].params if param.name == "cuda_graph"]
    named = re.sub(r" \(.*?\)", "", option.help.partition(": ")[2]).rstrip(".").split(", ")
    assert {name.removeprefix("or ") for name in named} == set(GRAPH_MODES)


def test_forced_mode_is_the_only_one_of_the_plan():
    there = graphs_of_machine(NEW, CUDA_13.get)
    assert plan_for("auto", there) is there
    assert [plan_for(mode, there).modes for mode in GRAPH_MODES[1:]] == [(mode,) for mode in GRAPH_MODES[1:]]
    with pytest.raises(BackendError, match=r"mode 'off': never\. Or use one that is there: switch"):
        plan_for("off", GraphPlan(modes=("switch",), missing={"off": "never"}))

"""`benchmarks/gpu.py`: it measures what it says, here on stand-ins, and says why where there is no GPU."""

import ctypes
import json
import math
import time

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_choices, graph_bench, host_loop
from engines.cuda_device import CudaDevice
from engines.device_timer import DeviceTimer
from engines.libcuda import Driver
from engines.store import EngineStore, PartStatus
from export.bundle import Bundle
from tests.fake_onnxruntime import install_onnxruntime
from tests.fake_tensorrt import FakeTensorRT, install_gpu


def test_every_figure_is_there(monkeypatch, tmp_path, bundle_copy, capsys):
    install_gpu(monkeypatch, tmp_path)
    monkeypatch.setattr(graph_bench, "_ROUNDS", 1)
    monkeypatch.setattr(graph_bench, "_LAUNCHES", 2)
    options = {"data": "synthetic:4", "n_masks": 6, "n_images": 3, "duration_s": 0.01}
    result = json.loads(json.dumps(dict(gpu.measure_backend("tensorrt", bundle_copy, **options))))
    assert set(result["parity"]) == {"chain", "graph", "full"}
    assert max(error for errors in result["parity"].values() for error in errors.values()) < 1e-4
    assert set(result) == {"parity", "profile", "graph, fp32", "graph, fp16"}
    graph = result["graph, fp16"]
    assert set(graph["ratios"]) == {"switch", "policy-cache", "policy-cache begun", "path-cache"}
    assert {f"to {name}" for name in graph["aims"]} < set(graph["ratios"]["switch"])
    assert (graph["n_kept"], graph["n_blocks"]) == (1, 3)
    assert all(math.isfinite(ms) and ms > 0 for ms in graph["median_ms"].values())
    assert set(graph["errors"]) == set(graph["ratios"])
    assert max(error for errors in graph["errors"].values() for error in errors.values()) < 1e-4
    assert graph["memory"] == {"images": 3, "growth_bytes": 0}
    gpu.print_results({"gpu": "stand-in"}, {"tensorrt": result, "torch": {"error": "no torch"}})
    text = capsys.readouterr().out
    assert "| tensorrt | graph |" in text
    assert "| torch | - | no torch |" in text


def test_graph_that_decides_computes_what_the_known_path_computes(monkeypatch, tmp_path, bundle_copy):
    install_gpu(monkeypatch, tmp_path)
    bench = graph_bench.GraphBench(Bundle.open(bundle_copy), "tensorrt")
    mask = np.array([True, False, True])
    decide = bench._deciding(bench._graphs.deciding([mask]), mask)
    decide.prepare()
    decide()
    logits = bench._graphs.logits
    expected = logits.read().copy()
    for known in (
        bench._deciding(bench._graphs.deciding(), mask),
        bench._request(bench._known_with_policy(mask)),
        bench._reading_back(mask),
    ):
        logits.write(0 * expected)
        known()
        np.testing.assert_allclose(logits.read(), expected, atol=1e-5)
    assert abs(expected).max() > 0.01


def test_policy_that_a_parallel_branch_spoils_is_seen(monkeypatch, tmp_path, bundle_copy):
    install_gpu(monkeypatch, tmp_path)
    monkeypatch.setattr(graph_bench, "_ROUNDS", 1)
    monkeypatch.setattr(graph_bench, "_LAUNCHES", 2)
    deciding = graph_bench.NetworkGraphs.deciding

    def spoilt(graphs, *arguments):
        call = deciding(graphs, *arguments)
        spoil = len(arguments) == 2  # masks, and what runs beside
        return lambda: (call(), spoil and graphs.probability.write(np.full((1, 3), 2, np.float32)))

    monkeypatch.setattr(graph_bench.NetworkGraphs, "deciding", spoilt)
    errors = graph_bench.GraphBench(Bundle.open(bundle_copy), "tensorrt").measure(n_images=1)["errors"]
    assert errors.pop("policy-cache begun")["probabilities"] > 0.5
    assert max(error for found in errors.values() for error in found.values()) == 0


def test_memory_is_watched_with_some_blocks_kept(monkeypatch, tmp_path, bundle_copy):
    install_gpu(monkeypatch, tmp_path)
    monkeypatch.setattr(graph_bench, "_ROUNDS", 1)
    monkeypatch.setattr(graph_bench, "_LAUNCHES", 2)
    bench = graph_bench.GraphBench(Bundle.open(bundle_copy), "tensorrt")
    bench.measure(n_images=2)
    assert bench._graphs.kept.read().tolist() == graph_bench.kept_masks(3)["some"].tolist()


@pytest.fixture
def once(monkeypatch):
    """Time everything by a single sample: on the stand-in each launch takes as long as the one before."""
    for name, value in (("_WARM_UP_S", 0), ("_SAMPLES", 1), ("_LAUNCHES", 5)):
        monkeypatch.setattr(gpu_choices, name, value)


def test_a_switch_for_more_blocks_costs_less(once, monkeypatch, tmp_path, export_random):
    """On the stand-in a conditional node takes a second, and launches and kernels a millisecond at most."""
    bundle = Bundle.open(export_random("resnet14").bundle)
    install_gpu(monkeypatch, tmp_path).conditional_ms = 1000
    found = gpu_choices.switch_sizes(bundle, "tensorrt", sizes=(1, 4, 6))
    n_switches = {size: round(row["none kept"] / 1e6) for size, row in found["switch"].items()}
    assert n_switches == {1: 6, 4: 2, 6: 1}
    assert found["full"] < found["known path, all kept"]


def test_speculations_are_timed_right_and_wrong(once, monkeypatch, tmp_path, export_random):
    bundle = Bundle.open(export_random("resnet14").bundle)
    install_gpu(monkeypatch, tmp_path)
    FakeTensorRT.notes["ms"] = {"keep_probability": 3}
    found = gpu_choices.speculated(bundle, "tensorrt", most=3)
    some = 3 + 2 + 2 + 1  # policy network, blocks, the shortcut parts of dropped ones, head; the stem is beside
    right = {n: round(row["right"] / 1000) for n, row in found.items()}
    assert right == {0: some, 1: some - 1, 2: some - 2, 3: some - 3 + 1}  # three and the stem take longer than 3 ms
    wrong = {n: round(row["wrong"] / 1000) for n, row in found.items()}
    assert [wrong[n] - wrong[0] for n in (1, 2, 3)] == [1, 1, 2]  # the stem again


def test_choices_are_written_as_they_come(monkeypatch, bundle_copy, tmp_path, capsys):
    def fail():
        raise RuntimeError("cuDNN refuses it")

    out = tmp_path / "choices.json"
    monkeypatch.setattr(gpu_choices, "describe_gpu", lambda device: {"gpu": "stand-in"})
    monkeypatch.setattr(gpu_choices, "switch_sizes", lambda bundle, backend: {"switch": {1: 2.0}})
    monkeypatch.setattr(gpu_choices, "speculated", lambda bundle, backend: json.loads(out.read_text())["graphs_us"])
    monkeypatch.setattr(gpu_choices, "block_formats", fail)
    monkeypatch.setattr(gpu_choices, "host_copies", lambda: "there")
    monkeypatch.setattr("sys.argv", ["gpu_choices", "--bundle", str(bundle_copy), "--out", str(out)])
    with pytest.raises(SystemExit, match=r"not measured: blocks_us, error RuntimeError: cuDNN refuses it"):
        gpu_choices.main()
    figures = json.loads(out.read_text())
    assert figures["begun_us"] == {"switch": {"1": 2.0}}  # what had been written by then
    assert figures["copies_us"] == "there"
    assert "cuDNN refuses it" in figures["blocks_us, error"]
    assert figures["gpu_afterwards"] == figures["gpu"]


def test_a_slow_start_and_a_slow_sample_do_not_count(monkeypatch):
    """As of a GPU that has yet to come to its clock, and of one that somebody else uses for a moment."""
    clock, began = [0.0], time.perf_counter()

    class Event:
        def record(self):
            self.ms = clock[0]

        def elapsed_time(self, end):
            return end.ms - self.ms

    def call():
        calls.append(None)
        starts = time.perf_counter() - began < 0.9 * gpu_choices._WARM_UP_S
        slow = len(calls) % (2 * gpu_choices._SAMPLES * gpu_choices._LAUNCHES) == 0
        clock[0] += 5 if starts else 100 if slow else 1

    calls = []
    timer = DeviceTimer(Event, lambda: None)
    assert gpu_choices._us(timer, call) == pytest.approx(1000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch can use")
def test_blocks_are_timed_in_every_format():
    found = gpu_choices.block_formats()
    assert len(found) == 8
    assert all(us > 0 for row in found.values() for pair in row.values() for us in pair)


@pytest.mark.parametrize("strategy", ["graph@switch", "graph@path-cache", "full", "chain"])
def test_host_loop_times_our_own_code(monkeypatch, tmp_path, bundle_copy, strategy):
    grown = []
    for i in range(3):  # the process has other memory, too, which may grow meanwhile: what adds up does so each time
        row = host_loop.host_loop(bundle_copy, strategy, 200, monkeypatch, tmp_path / str(i), n_warm_up=200)
        assert 0 < row["us_an_image"] < 1e5
        grown.append(row["growth_bytes"])
        if grown[-1] < 4 * 2**20:  # of 200 images
            break
    assert min(grown) < 4 * 2**20


def test_copies_are_timed_for_both_kinds_of_host_memory(monkeypatch, tmp_path):
    driver = install_gpu(monkeypatch, tmp_path)
    monkeypatch.setattr(driver, "_require_host", lambda address, n_bytes: None)
    monkeypatch.setattr(gpu_choices, "open_device", lambda device: CudaDevice(driver, 0))
    sent, upload = [], driver.cuMemcpyHtoDAsync

    def sending(target, source, n_bytes, stream):
        sent.append(ctypes.string_at(source, n_bytes))
        return upload(target, source, n_bytes, stream)

    monkeypatch.setattr(driver, "cuMemcpyHtoDAsync", sending)
    found = gpu_choices.host_copies(sizes=(64, 65))
    assert set(found) == {"64", "65"}
    assert min(len(set(values)) for values in sent) > 20  # pages of memory that are written to
    assert all(len(row) == 4 and min(row.values()) > 0 for row in found.values())
    directions = [driver.copies.count(name) for name in ("HtoD", "DtoH")]
    assert directions == [2 * 2 * gpu_choices._LAUNCHES] * 2


def test_backend_that_does_not_work_is_named_with_the_reason(bundle_copy, monkeypatch):
    monkeypatch.setattr("engines.registry.driver_from_libcuda", lambda: Driver(installed=False, error="no driver"))
    monkeypatch.setattr("engines.trt_identity.installed_version", lambda backend: "10.14.1")
    options = {"data": "synthetic:4", "n_masks": 1, "n_images": 1, "duration_s": 0.01}
    [(what, error)] = gpu.measure_backend("tensorrt", bundle_copy, **options)
    assert what == "error"
    assert error.startswith("BackendError: backend 'tensorrt', device 'cuda:0': no driver")


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-tensorrt"])
def test_package_for_cpus_alone_is_no_failed_measurement(bundle_copy, monkeypatch, tmp_path, backend):
    install_onnxruntime(monkeypatch, tmp_path, available=("CPUExecutionProvider",))
    options = {"data": "synthetic:4", "n_masks": 1, "n_images": 1, "duration_s": 0.01}
    found = dict(gpu.measure_backend(backend, bundle_copy, **options))
    assert set(found) == {"error"}
    assert "install it with: pip uninstall onnxruntime; pip install onnxruntime-gpu" in found["error"]
    assert gpu.failures({"torch": {"parity": {}}, backend: found}) == []


def test_measurement_that_fails_does_not_stop_the_others(bundle_copy, monkeypatch, tmp_path):
    install_gpu(monkeypatch, tmp_path)

    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "parity", fail)
    monkeypatch.setattr(gpu, "measure_graphs", lambda bundle, backend, precision, n_images: precision)
    options = {"data": "synthetic:4", "n_masks": 1, "n_images": 1, "duration_s": 0.01}
    found = dict(gpu.measure_backend("tensorrt", bundle_copy, **options))
    reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert found.pop("parity, error") == reason
    assert found.pop("profile")["strategies"]
    assert found == {"graph, fp32": "fp32", "graph, fp16": "fp16"}


def test_engines_that_do_not_build_cost_their_precision_alone(bundle_copy, monkeypatch, tmp_path, capsys):
    install_gpu(monkeypatch, tmp_path)
    monkeypatch.setattr(graph_bench, "_ROUNDS", 1)
    monkeypatch.setattr(graph_bench, "_LAUNCHES", 2)
    build = EngineStore._build_part

    def build_part(store, backend, part, layout):
        if (part.name, store.precision) == ("full", "fp16"):
            return PartStatus(name="full", status="failed", seconds=0, message="part 'full': not finite in half")
        return build(store, backend, part, layout)

    monkeypatch.setattr(EngineStore, "_build_part", build_part)
    options = {"data": "synthetic:4", "n_masks": 1, "n_images": 1, "duration_s": 0.01}
    found = dict(gpu.measure_backend("tensorrt", bundle_copy, **options))
    assert set(found) == {"parity", "profile", "graph, fp32", "graph, fp16, error"}
    reason = "EngineError: 1 engine did not build in fp16; the first: part 'full': not finite in half"
    assert found["graph, fp16, error"] == reason
    gpu.print_results({"gpu": "stand-in"}, {"tensorrt": found, "torch": {"profile": found["profile"]}})
    text = capsys.readouterr().out
    assert f"| tensorrt | graph, fp16 | {reason} | | |" in text
    assert "| tensorrt | chain |" in text
    assert "| torch | chain | - | " in text
    assert "tensorrt, fp32: an image" in text


def test_only_measurements_that_fail_where_a_backend_works_are_failures():
    missing = {"error": "not installed"}
    assert gpu.failures({"torch": {"parity": {}, "graph, fp32": {}}, "tensorrt": missing}) == []
    failed = {"parity": {}, "graph, fp32, error": "out of memory"}
    assert gpu.failures({"torch": failed, "tensorrt": missing}) == ["torch: graph, fp32 failed"]
    assert gpu.failures({"torch": missing}) == ["no backend works here"]


def test_machine_without_a_gpu_is_told(monkeypatch):
    nothing = Driver(installed=False, error="no NVIDIA driver (libcuda not found)")
    monkeypatch.setattr("bdtool.profiling.environment.driver_from_libcuda", lambda: nothing)
    monkeypatch.setattr("benchmarks.gpu.driver_from_libcuda", lambda: nothing)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"no GPU to measure: no NVIDIA driver.*bdtool doctor"):
        gpu.main()


def test_another_policy_network_has_a_file_of_its_own(monkeypatch, capsys):
    assert gpu.default_file("NVIDIA H100 80GB").name == "gpu-nvidia-h100-80gb.json"
    assert gpu.default_file("NVIDIA H100", policy_downscale=2).name == "gpu-nvidia-h100-policy-downscale-2.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--bundle", "bundle", "--policy-downscale", "2"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "a bundle has its own policy network" in capsys.readouterr().err

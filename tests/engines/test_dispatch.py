"""The decision inside a CUDA graph: its arithmetic, its kernel, and the graph around it. No GPU is needed."""

import ctypes
import math
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdtool.errors import BackendError, EngineError
from engines.cuda_graph import CapturedNetwork, DispatchMemory, GraphBuilder
from engines.dispatch import FORCE_DROP, FORCE_KEEP, NOT_FINITE, dispatch
from engines.dispatch_kernel import KERNEL_NAME, SOURCE, cubin_from_source
from tests.fake_driver import FakeDriver, Handles

float32 = st.floats(0, 1, width=32)
# of each block: probability, whether it has a shortcut part, and the override
blocks = st.lists(st.tuples(float32 | st.just(0.5) | st.just(math.nan), st.booleans(), st.integers(0, 2)), max_size=40)


def _run_bodies(result, has_shortcut):
    """Do what the graph does: two buffers, and for each block the body that its SWITCH is set to."""
    buffers = [[], ["garbage"]]
    for k, value in enumerate(result.switches):
        bodies = [None, ("block", 0, 1), ("block", 1, 0)]
        if has_shortcut[k]:
            bodies += [("shortcut", 0, 1), ("shortcut", 1, 0)]
        if bodies[value] is not None:
            kind, source, target = bodies[value]
            buffers[target] = [*buffers[source], (kind, k)]
    return buffers[result.head]


@given(blocks, st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_bodies_compute_what_running_kept_blocks_in_order_computes(rows, threshold):
    probabilities, has_shortcut, force = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    expected = []
    for k, (p, shortcut, forced) in enumerate(rows):
        if forced == FORCE_KEEP or (forced != FORCE_DROP and p >= threshold):
            expected.append(("block", k))
        elif shortcut:
            expected.append(("shortcut", k))
    result = dispatch(probabilities, has_shortcut, threshold=threshold, force=force)
    assert _run_bodies(result, has_shortcut) == expected


@given(st.lists(float32, max_size=30))
def test_probability_at_the_threshold_keeps(probabilities):
    result = dispatch(probabilities, [False] * len(probabilities), threshold=0.5)
    assert result.kept == tuple(int(p >= 0.5) for p in probabilities)


def test_policy_that_gives_nan_is_told_apart_from_one_that_drops():
    assert dispatch([math.nan, 0.0], [False, False], threshold=0.5).kept == (NOT_FINITE, 0)
    assert dispatch([math.nan], [False], threshold=0.5, force=[FORCE_KEEP]).kept == (1,)


@pytest.mark.parametrize("bad", [([0.1], [], None), ([0.1], [True], [0, 0]), ([0.1] * 129, [True] * 129, None)])
def test_lengths_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="at most 128"):
        dispatch(*bad[:2], threshold=0.5, force=bad[2])


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
def test_kernel_compiles_to_machine_code(sm):
    cubin = cubin_from_source(SOURCE, sm)
    assert cubin[:4] == b"\x7fELF"
    assert KERNEL_NAME.encode() in cubin
    assert b"cudaGraphSetConditional" in cubin  # left for the driver to bind


def test_architecture_that_nvrtc_does_not_know_is_named():
    with pytest.raises(BackendError, match=r"NVRTC compiles for the compute capabilities 75, .*, not for 35"):
        cubin_from_source(SOURCE, 35)


def test_wrong_source_is_quoted():
    with pytest.raises(BackendError, match=r'NVRTC refuses a kernel for .* 90: .*"frobnicate" is undefined'):
        cubin_from_source('extern "C" __global__ void k() { frobnicate(); }', 90)


@pytest.fixture(scope="module")
def kernel_on_the_cpu(tmp_path_factory):
    """The kernel's own source as a function of this process: it is plain C++ but for a few words."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    directory = tmp_path_factory.mktemp("kernel")
    words = "#define __device__\n#define __global__\n#define __restrict__\n"
    indices = "static const struct { unsigned int x; } blockIdx = {0}, threadIdx = {0};\n"
    record = 'unsigned int last_value[256];\nextern "C" void cudaGraphSetConditional(u64 h, unsigned int v) '
    record += "{ last_value[h] = v; }\n"
    (directory / "k.cpp").write_text(words + indices + SOURCE + record)
    library = directory / "k.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, directory / "k.cpp"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@given(rows=blocks, use_force=st.booleans())
def test_kernel_computes_what_its_twin_computes(kernel_on_the_cpu, rows, use_force):
    n, threshold, head = len(rows), np.float32(0.5), 200
    columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
    p, shortcut, force = (np.array(c, t) for c, t in zip(columns, ("f4", "u1", "u1"), strict=True))
    kept, side, handles = np.full(n, 9, "u1"), ctypes.c_int(9), Handles()
    handles.h[:n] = range(n)
    addresses = [ctypes.c_void_p(a.ctypes.data) for a in (p, shortcut)]
    addresses.append(ctypes.c_void_p(force.ctypes.data) if use_force else None)
    kernel_on_the_cpu.bd_dispatch(
        *addresses,
        ctypes.c_int(n),
        ctypes.c_float(threshold),
        ctypes.c_void_p(kept.ctypes.data),
        ctypes.byref(side),
        ctypes.c_uint64(head),
        handles,
    )
    values = (ctypes.c_uint * 256).in_dll(kernel_on_the_cpu, "last_value")
    expected = dispatch(p, shortcut, threshold=threshold, force=force if use_force else None)
    assert tuple(kept) == expected.kept
    assert tuple(values[:n]) == expected.switches
    assert values[head] == side.value == expected.head


# --- the graph --------------------------------------------------------------------------------------------------------


MEMORY = DispatchMemory(probability=11, has_shortcut=12, force=0, kept=13, head_side=14)


@pytest.fixture
def driver():
    return FakeDriver()


def _network(driver, bodies=((None, 31, 32), (None, 41, 42, 43, 44))):
    graphs = [[None if b is None else driver.CUgraph(b) for b in block] for block in bodies]
    captured = {"policy": driver.CUgraph(21), "stem": driver.CUgraph(22), "blocks": graphs}
    return CapturedNetwork(**captured, heads=(driver.CUgraph(51), driver.CUgraph(52)))


def _build(driver, network=None):
    builder = GraphBuilder(driver, driver.CUcontext(0xC0))
    return builder.dispatch_graph(network or _network(driver), driver.CUfunction(0xF), MEMORY, threshold=0.5)


def test_graph_runs_policy_beside_stem_then_blocks_then_head(driver):
    graph, executable = _build(driver)
    entries = driver.graphs[int(graph)]
    first = int(graph)
    assert [entry[0] for entry, _ in entries] == ["child", "kernel", "child", "switch", "switch", "switch"]
    assert [after for _, after in entries] == [[], [first + 1], [], [first + 2, first + 3], [first + 4], [first + 5]]
    assert (entries[0][0][1], entries[2][0][1]) == (21, 22)
    assert driver.instantiated == [first]
    assert int(executable) == first


def test_each_switch_has_its_own_handle_and_captured_bodies(driver):
    graph, _ = _build(driver)
    switches = [entry for entry, _ in driver.graphs[int(graph)] if entry[0] == "switch"]
    assert [handle for _, handle, _ in switches] == driver.handles == [100, 101, 102]
    content = [[[child for (_, child), _ in driver.graphs[body]] for body in bodies] for _, _, bodies in switches]
    assert content == [[[], [31], [32]], [[], [41], [42], [43], [44]], [[51], [52]]]


def test_kernel_gets_the_memory_and_the_handles_in_order(driver):
    graph, _ = _build(driver)
    [arguments] = [entry[1] for entry, _ in driver.graphs[int(graph)] if entry[0] == "kernel"]
    assert arguments[:-1] == [11, 12, 0, 2, 0.5, 13, 14, 102]
    assert arguments[-1][:3] == [100, 101, 0]


@pytest.mark.parametrize("kind", ["HOST", "EVENT_RECORD", "MEM_ALLOC"])
def test_captured_work_that_no_body_may_hold_is_refused_by_name(driver, kind):
    driver.kinds[42] = ["KERNEL", kind]
    with pytest.raises(EngineError, match=f"block 1: its captured work holds {kind} nodes"):
        _build(driver)


@pytest.mark.parametrize("call", ["cuGraphCreate", "cuGraphAddNode", "cuGraphInstantiateWithParams", "cuGraphGetNodes"])
def test_driver_that_refuses_is_quoted(driver, call):
    driver.failing = call
    with pytest.raises(EngineError, match="CUDA_ERROR_INVALID_VALUE"):
        _build(driver)


@pytest.mark.parametrize("bodies", [(None, 1), (1, 2, 3), (None, 1, None), (None, 1, 2, 3)])
def test_bodies_that_do_not_fit_the_dispatch_are_refused(driver, bodies):
    with pytest.raises(ValueError, match="block 0: expected bodies"):
        _build(driver, _network(driver, (bodies,)))


def test_more_blocks_than_handles_are_refused(driver):
    with pytest.raises(ValueError, match="at most 128"):
        _build(driver, _network(driver, ((None, 1, 2),) * 129))


def test_flat_graph_is_its_parts_one_after_the_other(driver):
    builder = GraphBuilder(driver, driver.CUcontext(0xC0))
    graph, executable = builder.flat_graph([driver.CUgraph(address) for address in (21, 22, 23)])
    first = int(graph)
    entries = driver.graphs[first]
    assert [entry for entry, _ in entries] == [("child", 21), ("child", 22), ("child", 23)]
    assert [after for _, after in entries] == [[], [first + 1], [first + 2]]
    assert driver.instantiated == [int(executable)]


def test_bindings_of_cuda_12_take_no_edge_data(driver):
    calls = []

    class Driver12(SimpleNamespace):
        cuGraphAddNode_v2 = None

        def __getattr__(self, name):
            return getattr(driver, name)

        def cuGraphAddNode(self, graph, after, count, params):
            calls.append(count)
            return driver.cuGraphAddNode(graph, after, None, count, params)

    _build(Driver12(), _network(driver))
    assert calls == [1, 2, 1, 1]

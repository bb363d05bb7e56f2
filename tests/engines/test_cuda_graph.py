"""The CUDA graphs around the decision, as a stand-in for the driver is told to build them. No GPU is needed."""

import gc
import sys

import pytest

from bdtool.errors import EngineError
from engines.capture import launch_call
from engines.cuda_device import CudaDevice
from engines.cuda_graph import CapturedBlock, CapturedNetwork, DispatchMemory, GraphBuilder, Kernels, LookupMemory
from tests.fake_driver import FakeDriver

MEMORY = DispatchMemory(probability=11, has_shortcut=12, force=0, kept=13)


@pytest.fixture
def driver():
    return FakeDriver()


def _network(driver, blocks=(((31, 32), None), ((41, 42), (43, 44)), ((61, 62), None))):
    def both(addresses):
        return None if addresses is None else tuple(map(driver.CUgraph, addresses))

    captured = [CapturedBlock(block=both(block), shortcut=both(shortcut)) for block, shortcut in blocks]
    policy, stem = driver.CUgraph(21), driver.CUgraph(22)
    return CapturedNetwork(policy=policy, stem=stem, blocks=captured, heads=both((51, 52)))


def _kernels(driver):
    dispatch, lookup = map(driver.CUfunction, (0xF, 0x10))
    return Kernels(dispatch=dispatch, lookup=lookup)


def _build(driver, network=None):
    builder = GraphBuilder(driver, driver.CUcontext(0xC0), blocks_per_switch=2)
    return builder.dispatch_graph(network or _network(driver), _kernels(driver), MEMORY, threshold=0.5)


def test_graph_runs_policy_beside_stem_then_blocks_then_head(driver):
    graph, executable = _build(driver)
    entries = driver.graphs[int(graph)]
    first = int(graph)
    assert [entry[0] for entry, _ in entries] == ["child", "child", "kernel", "switch", "switch"]
    assert [after for _, after in entries] == [[], [], [first + 1], [first + 3, first + 2], [first + 4]]
    assert (entries[0][0][1], entries[1][0][1]) == (21, 22)
    assert driver.instantiated == [first]
    assert int(executable) == first


def test_each_switch_has_its_own_handle_and_captured_bodies(driver):
    graph, _ = _build(driver)
    switches = [entry for entry, _ in driver.graphs[int(graph)] if entry[0] == "switch"]
    assert [handle for _, handle, _ in switches] == driver.handles == [100, 101]
    content = [[[child for (_, child), _ in driver.graphs[body]] for body in bodies] for _, _, bodies in switches]
    # for the bits of two blocks, the first one's lowest, and within them for either buffer; the second has a shortcut
    assert content[0] == [[43], [44], [31, 44], [32, 43], [41], [42], [31, 42], [32, 41]]
    assert content[1] == [[51], [52], [61, 52], [62, 51]]  # what is left, and the head


def test_nodes_of_a_body_run_one_after_the_other(driver):
    graph, _ = _build(driver)
    [first, _] = [entry[2] for entry, _ in driver.graphs[int(graph)] if entry[0] == "switch"]
    assert [after for _, after in driver.graphs[first[6]]] == [[], [first[6] + 1]]


def test_kernel_gets_the_memory_and_the_handles_in_order(driver):
    graph, _ = _build(driver)
    [arguments] = [entry[1] for entry, _ in driver.graphs[int(graph)] if entry[0] == "kernel"]
    assert arguments[:-1] == [11, 12, 0, 3, 0.5, 2, 13]
    assert arguments[-1][:3] == [100, 101, 0]


@pytest.mark.parametrize("kind", ["HOST", "EVENT_RECORD", "MEM_ALLOC"])
def test_captured_work_that_no_body_may_hold_is_refused_by_name(driver, kind):
    driver.kinds[42] = ["KERNEL", kind]
    with pytest.raises(EngineError, match=f"block 1: its captured work holds {kind} nodes"):
        _build(driver)


@pytest.mark.parametrize(
    ("call", "step"),
    [
        ("cuGraphCreate", "a new graph"),
        ("cuGraphConditionalHandleCreate", "a conditional handle"),
        ("cuGraphAddChildGraphNode", "captured work as a child graph"),
        ("cuGraphAddNode", "a kernel"),
        ("cuGraphInstantiateWithParams", r"to instantiate the graph \(CUDA_GRAPH_INSTANTIATE_SUCCESS\)"),
        ("cuGraphGetNodes", "to list the nodes of stem"),
    ],
)
def test_driver_that_refuses_is_quoted_with_the_step(driver, call, step):
    driver.failing = call
    words = rf"^CUDA graph: the CUDA driver refuses {step}: CUDA_ERROR_INVALID_VALUE\. Use another --cuda-graph mode"
    with pytest.raises(EngineError, match=words):
        _build(driver)


@pytest.mark.parametrize("n_blocks", [0, 129])
def test_number_of_blocks_that_has_no_handles_is_refused(driver, n_blocks):
    with pytest.raises(ValueError, match=f"{n_blocks} blocks; .*at most 128"):
        _build(driver, _network(driver, (((1, 2), None),) * n_blocks))


def test_flat_graph_is_its_parts_one_after_the_other(driver):
    builder = GraphBuilder(driver, driver.CUcontext(0xC0))
    graph, executable = builder.flat_graph([driver.CUgraph(address) for address in (21, 22, 23)])
    first = int(graph)
    entries = driver.graphs[first]
    assert [entry for entry, _ in entries] == [("child", 21), ("child", 22), ("child", 23)]
    assert [after for _, after in entries] == [[], [first + 1], [first + 2]]
    assert driver.instantiated == [int(executable)]


LOOKUP = LookupMemory(masks=15, n_masks=2)


def _cached(driver, paths=((61, 62), (63,)), begun=()):
    builder = GraphBuilder(driver, driver.CUcontext(0xC0), blocks_per_switch=2)
    graphs = [[driver.CUgraph(address) for address in path] for path in paths]
    begun = [driver.CUgraph(address) for address in begun]
    return builder.cached_graph(
        _network(driver), _kernels(driver), MEMORY, LOOKUP, paths=graphs, begun=begun, threshold=0.5
    )


def test_cached_graph_has_a_body_for_each_path_and_decides_in_the_last(driver):
    graph, executable = _cached(driver)
    first, entries = int(graph), driver.graphs[int(graph)]
    assert [entry[0] for entry, _ in entries] == ["child", "lookup", "child", "switch"]
    assert [after for _, after in entries] == [[], [first + 1], [], [first + 2, first + 3]]
    _, handle, bodies = entries[3][0]
    flat = [[(entry[1], after) for entry, after in driver.graphs[body]] for body in bodies[:2]]
    assert flat == [[(61, []), (62, [bodies[0] + 1])], [(63, [])]]
    assert [entry[0] for entry, _ in driver.graphs[bodies[2]]] == ["kernel", "switch", "switch"]
    assert entries[1][0][1] == [11, 0, 3, 0.5, 15, 2, 13, handle]
    assert driver.instantiated == [int(executable)] == [first]


def test_begun_work_runs_beside_the_policy_and_other_masks_start_again(driver):
    graph, _ = _cached(driver, begun=(31, 44))
    first, entries = int(graph), driver.graphs[int(graph)]
    assert [entry[:2] for entry, _ in entries[:1] + entries[2:5]] == [("child", n) for n in (21, 22, 31, 44)]
    assert [entry[0] for entry, _ in entries[1::4]] == ["lookup", "switch"]
    assert [[node - first for node in after] for _, after in entries] == [[], [1], [], [3], [4], [2, 5]]
    other = entries[5][0][2][2]
    body = driver.graphs[other]
    assert [entry[0] for entry, _ in body] == ["child", "kernel", "switch", "switch"]
    assert body[0][0] == ("child", 22)  # the stem, whose output was overwritten
    assert [[node - other for node in after] for _, after in body] == [[], [], [2, 1], [3]]


def test_begun_graph_has_the_policy_beside_the_others(driver):
    builder = GraphBuilder(driver, driver.CUcontext(0xC0))
    graph, executable = builder.begun_graph(_network(driver), [driver.CUgraph(31)])
    entries = driver.graphs[int(graph)]
    assert [entry for entry, _ in entries] == [("child", 21), ("child", 22), ("child", 31)]
    assert [[node - int(graph) for node in after] for _, after in entries] == [[], [], [2]]
    assert driver.instantiated == [int(executable)]


def test_handle_belongs_to_the_graph_that_holds_its_node(driver):
    graph, _ = _cached(driver)
    last = driver.graphs[int(graph)][3][0][2][2]
    assert driver.owner_of_handle == {100: int(graph), 101: last, 102: last}


def test_paths_that_are_not_as_many_as_masks_are_refused(driver):
    with pytest.raises(ValueError, match="1 paths for 2 masks"):
        _cached(driver, paths=((61,),))


@pytest.mark.parametrize("failing", [None, "cuCtxPushCurrent", "cuGraphExecDestroy"])
def test_graphs_are_given_back_in_their_context_and_nobody_is_told_of_trouble(driver, monkeypatch, failing):
    """The context may be gone before what was in it, as at the end of a process."""
    contexts, told, destroy = [], [], driver.cuGraphExecDestroy
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(
        driver, "cuGraphExecDestroy", lambda graph: contexts.extend(map(int, driver.contexts)) or destroy(graph)
    )
    graph, executable = _build(driver)
    call = launch_call(CudaDevice(driver, 0), executable, keep_alive=None, graph=graph)
    driver.failing = failing
    del call
    gc.collect()
    assert told == []
    assert driver.destroyed == ([] if failing == "cuCtxPushCurrent" else [int(graph), int(executable)])
    assert contexts == ([] if failing == "cuCtxPushCurrent" else [0xC0])


@pytest.mark.parametrize("is_of_12", [True, False])
def test_bindings_of_cuda_12_take_no_edge_data(driver, is_of_12):
    if is_of_12:
        driver.cuGraphAddNode_v2 = None
    elif hasattr(driver, "cuGraphAddNode_v2"):
        pytest.skip("these bindings are of CUDA 12")
    _build(driver, _network(driver))
    assert driver.calls["cuGraphAddNode"] == 3

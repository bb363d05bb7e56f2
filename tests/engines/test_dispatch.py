"""The decision inside a CUDA graph: its arithmetic and its kernels. No GPU is needed."""

import ctypes
import math
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdtool.errors import BackendError
from engines.dispatch import NOT_FINITE, bits_from_words, body_runs, mask_table
from engines.dispatch_kernel import KERNEL_NAME, LOOKUP_NAME, SOURCE, cubin_from_source
from export.fused_spec import FORCE_DROP, FORCE_KEEP
from tests.dispatch_twin import dispatch, lookup
from tests.fake_driver import Handles

float32 = st.floats(0, 1, width=32)
# of each block: probability, whether it has a shortcut part, and the override
blocks = st.lists(st.tuples(float32 | st.just(0.5) | st.just(math.nan), st.booleans(), st.integers(0, 2)), max_size=40)


def _run_bodies(result, has_shortcut, per_switch):
    """Do what the graph does: two buffers, and for each group of blocks the body that its SWITCH is set to."""
    buffers, side = [[], ["garbage"]], 0
    for index, value in enumerate(result.switches):
        group = has_shortcut[index * per_switch : (index + 1) * per_switch]
        assert value < 2 << len(group)  # as many bodies as there are
        found, side = body_runs(value, group)
        for run in found:
            kind = "block" if run.is_kept else "shortcut"
            buffers[1 - run.side] = [*buffers[run.side], (kind, index * per_switch + run.block)]
    return buffers[side]


@given(blocks, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 5))
def test_bodies_compute_what_running_kept_blocks_in_order_computes(rows, threshold, per_switch):
    probabilities, has_shortcut, force = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    expected = []
    for k, (p, shortcut, forced) in enumerate(rows):
        if forced == FORCE_KEEP or (forced != FORCE_DROP and p >= threshold):
            expected.append(("block", k))
        elif shortcut:
            expected.append(("shortcut", k))
    result = dispatch(probabilities, has_shortcut, threshold=threshold, force=force, blocks_per_switch=per_switch)
    assert _run_bodies(result, has_shortcut, per_switch) == expected


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


masks = st.integers(1, 128).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=20)
)


@given(masks, st.data())
def test_lookup_finds_the_row_of_a_mask_and_only_that(known, data):
    table = mask_table(known)
    n_blocks = len(known[0])
    assert {tuple(bits_from_words(row, n_blocks)) for row in table} == {tuple(mask) for mask in known}
    assert list(table) == sorted(set(table))
    mask = data.draw(st.sampled_from(known) | st.lists(st.booleans(), min_size=n_blocks, max_size=n_blocks))
    result = lookup([float(bit) for bit in mask], table, threshold=0.5)
    assert result.kept == tuple(map(int, mask))
    if mask in known:
        assert bits_from_words(table[result.path], n_blocks) == mask
    else:
        assert result.path == len(table)


def test_lookup_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at most 128"):
        lookup([0.1] * 129, [], threshold=0.5)
    with pytest.raises(ValueError, match="as many overrides"):
        lookup([0.1], [], threshold=0.5, force=[0, 0])


# --- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
def test_kernel_compiles_to_machine_code(sm):
    cubin = cubin_from_source(SOURCE, sm)
    assert cubin[:4] == b"\x7fELF"
    assert KERNEL_NAME.encode() in cubin
    assert LOOKUP_NAME.encode() in cubin
    assert b"cudaGraphSetConditional" in cubin  # left for the driver to bind


def test_kernels_are_compiled_once_and_failures_are_not_kept(monkeypatch):
    found, other = cubin_from_source(SOURCE, 90), 'extern "C" __global__ void other() { frobnicate(); }'
    with pytest.raises(BackendError, match="frobnicate"):
        cubin_from_source(other, 90)
    monkeypatch.setattr("engines.dispatch_kernel._compile", lambda nvrtc, source, sm: b"compiled again")
    assert cubin_from_source(SOURCE, 90) == found
    assert cubin_from_source(other, 90) == b"compiled again"


def test_architecture_that_nvrtc_does_not_know_is_named():
    with pytest.raises(BackendError, match=r"NVRTC compiles for the compute capabilities .*75, .*, not for 35"):
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
    words = "#define __device__\n#define __global__\n#define __restrict__\n#define __shared__ static\n"
    words += "#define __syncthreads()\n"  # of one thread, which does what all would
    indices = "static const struct { int x; } threadIdx = {0}, blockDim = {1};\n"
    record = 'unsigned int last_value[256];\nextern "C" void cudaGraphSetConditional(u64 h, unsigned int v) '
    record += "{ last_value[h] = v; }\n"
    (directory / "k.cpp").write_text(words + indices + SOURCE + record)
    library = directory / "k.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, directory / "k.cpp"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@given(rows=blocks, use_force=st.booleans(), per_switch=st.integers(1, 5))
def test_kernel_computes_what_its_twin_computes(kernel_on_the_cpu, rows, use_force, per_switch):
    n, threshold = len(rows), np.float32(0.5)
    columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
    p, shortcut, force = (np.array(c, t) for c, t in zip(columns, ("f4", "u1", "u1"), strict=True))
    kept, handles = np.full(n, 9, "u1"), Handles()
    handles.h[:n] = range(n)
    addresses = [ctypes.c_void_p(a.ctypes.data) for a in (p, shortcut)]
    addresses.append(ctypes.c_void_p(force.ctypes.data) if use_force else None)
    kernel_on_the_cpu.bd_dispatch(
        *addresses,
        ctypes.c_int(n),
        ctypes.c_float(threshold),
        ctypes.c_int(per_switch),
        ctypes.c_void_p(kept.ctypes.data),
        handles,
    )
    values = (ctypes.c_uint * 256).in_dll(kernel_on_the_cpu, "last_value")
    given_bits = force if use_force else None
    expected = dispatch(p, shortcut, threshold=threshold, force=given_bits, blocks_per_switch=per_switch)
    assert tuple(kept) == expected.kept
    assert tuple(values[: len(expected.switches)]) == expected.switches


@given(rows=blocks, others=st.lists(st.lists(st.booleans(), max_size=40), max_size=8), use_force=st.booleans())
def test_lookup_kernel_computes_what_its_twin_computes(kernel_on_the_cpu, rows, others, use_force):
    n, path = len(rows), 201
    columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
    p, _, force = (np.array(c, t) for c, t in zip(columns, ("f4", "u1", "u1"), strict=True))
    mine = [bit == 1 for bit in lookup(p, [], threshold=0.5, force=force if use_force else None).kept]
    table = mask_table([*others, mine][-(len(others) % 3 + 1) :])
    words, kept = np.array(table, np.uint64), np.full(n, 9, "u1")
    kernel_on_the_cpu.bd_lookup(
        ctypes.c_void_p(p.ctypes.data),
        ctypes.c_void_p(force.ctypes.data) if use_force else None,
        ctypes.c_int(n),
        ctypes.c_float(0.5),
        ctypes.c_void_p(words.ctypes.data),
        ctypes.c_int(len(table)),
        ctypes.c_void_p(kept.ctypes.data),
        ctypes.c_uint64(path),
    )
    expected = lookup(p, table, threshold=0.5, force=force if use_force else None)
    assert tuple(kept) == expected.kept
    assert (ctypes.c_uint * 256).in_dll(kernel_on_the_cpu, "last_value")[path] == expected.path


@given(st.lists(st.lists(st.booleans(), min_size=128, max_size=128), min_size=1, max_size=12), st.integers(0, 12))
def test_lookup_kernel_finds_masks_of_two_words(kernel_on_the_cpu, known, index):
    mask = known[index] if index < len(known) else [not bit for bit in known[0]]
    table = mask_table(known)
    p, words, kept = np.array(mask, "f4"), np.array(table, np.uint64), np.full(128, 9, "u1")
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (p, words, kept)]
    sizes = ctypes.c_int(128), ctypes.c_float(0.5)
    handle = ctypes.c_uint64(7)
    kernel_on_the_cpu.bd_lookup(pointers[0], None, *sizes, pointers[1], ctypes.c_int(len(table)), pointers[2], handle)
    assert (ctypes.c_uint * 256).in_dll(kernel_on_the_cpu, "last_value")[7] == lookup(p, table, threshold=0.5).path

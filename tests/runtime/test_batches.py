"""Batches whose images keep different blocks: each part runs once, on the images that need it, in reused memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bdtool import Orchestrator
from bdtool.runtime import rows as rows_module
from bdtool.runtime.controllers import MaskController
from bdtool.runtime.rows import RowRunner
from engines.fake import FakeBackend
from tests.fake_tensorrt import install_gpu

K = 6
MEASURED = RowRunner._everyone_from
SHORTCUTS = {2, 4}  # blocks of the hand-made network that have a shortcut


@pytest.fixture(scope="module", autouse=True, params=["gather", "everyone", "one batch size"])
def cheaper(request):
    """What the cost model finds cheaper where it has the choice: it would measure, and no two runs were the same.

    "one batch size": the backend has no choice, its engines plan by batch.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeBackend, "plans_by_batch", request.param == "one batch size")
        patch.setattr(RowRunner, "_everyone_from", lambda rows, step, side: _everyone_from(request.param, rows, step))
        yield request.param


def _everyone_from(cheaper, rows, step):
    return 0 if cheaper == "everyone" and step.shortcut_part is None else rows._n_images


def _expected_calls(keep, cheaper):
    """Oracle: each block once on the images that keep it, or on all; then its shortcut on the others, or on all."""
    n_images = len(keep)
    if cheaper == "one batch size":
        return [(name, n_images) for name, _ in _expected_calls(keep, "gather")]
    calls = [("stem", n_images)]
    for k, n_kept in enumerate(keep.sum(axis=0).tolist()):
        if n_kept:
            with_everyone = cheaper == "everyone" and 2 * n_kept > n_images and k not in SHORTCUTS
            calls.append((f"block_{k:02}", n_images if with_everyone else n_kept))
        if n_kept < n_images and k in SHORTCUTS:
            calls.append((f"shortcut_{k:02}", n_images - n_kept))
    return [*calls, ("head", n_images)]


@settings(max_examples=60)
@given(keep=hnp.arrays(bool, st.tuples(st.integers(1, 8), st.just(K))))
def test_each_part_runs_once_on_the_images_that_need_it(fake, images_of, cheaper, keep):
    opened = fake(max_batch=8)
    opened.runtime.run(images_of(range(len(keep))), policy=keep)
    assert opened.backend.calls == _expected_calls(keep, cheaper)


@pytest.fixture(scope="module")
def wide(fake, cheaper):
    """One runtime for many batches, so that rows which an earlier one left in a buffer would be found."""
    return fake(max_batch=64).runtime


@settings(max_examples=40)
@given(data=st.data(), n=st.sampled_from([*range(1, 9), 64]))
def test_mixed_batches_equal_the_oracle(wide, images_of, fake_oracle, data, n):
    keep = data.draw(hnp.arrays(bool, (n, K)))
    values = [(7 * i + n) % 97 for i in range(n)]
    logits = wide.run(images_of(values), policy=keep).logits[:, 0]
    assert logits.tolist() == [fake_oracle(value, row) for value, row in zip(values, keep, strict=True)]


@pytest.mark.parametrize("k", sorted(set(range(K)) - SHORTCUTS))
@pytest.mark.parametrize("kept", [[0], [3], [1, 2], [0, 1, 3]])
def test_rows_that_drop_a_block_without_shortcut_stay_as_they_were(wide, images_of, fake_oracle, k, kept):
    keep = np.zeros((4, K), dtype=bool)
    keep[kept, k] = True
    logits = wide.run(images_of([11, 22, 33, 44]), policy=keep).logits[:, 0]
    assert logits.tolist() == [fake_oracle(v, row) for v, row in zip([11, 22, 33, 44], keep, strict=True)]


def test_memory_of_a_batch_size_is_allocated_once(fake, images_of, monkeypatch):
    opened = fake(max_batch=8)
    allocate, shapes = opened.backend.allocate, []
    monkeypatch.setattr(opened.backend, "allocate", lambda *args: (shapes.append(args[0]), allocate(*args))[1])
    rng = np.random.default_rng(0)
    images = images_of(range(8))
    for n_kept in (4, 7):  # every block is mixed, with the choice and without
        opened.runtime.run(images, policy=np.arange(8)[:, None] < np.full(K, n_kept))
    n_allocated = len(shapes)
    for _ in range(200):
        opened.runtime.run(images, policy=rng.random((8, K)) < rng.random())
    assert 0 < len(shapes) == n_allocated


def test_wrap_sees_the_calls_of_mixed_batches(fake, images_of, cheaper):
    opened, seen = fake(), []

    def wrap(part, call):
        return lambda: (seen.append(part.name), call())

    keep = np.random.default_rng(1).random((4, K)) < 0.5
    opened.runtime.timed(wrap).run(images_of(range(4)), policy=keep)
    assert seen == [name for name, _ in _expected_calls(keep, cheaper)]
    assert seen == [name for name, _ in opened.backend.calls]


def test_measured_cost_model_leaves_the_answers_right(fake, images_of, fake_oracle):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowRunner, "_everyone_from", MEASURED)
        runtime, rng = fake(max_batch=64).runtime, np.random.default_rng(2)
        for kept in (0.3, 0.6, 0.9, 0.95):
            keep = rng.random((64, K)) < kept
            logits = runtime.run(images_of(range(64)), policy=keep).logits[:, 0]
            assert logits.tolist() == [fake_oracle(value, row) for value, row in enumerate(keep)]


def test_costs_are_measured_once_for_sizes_that_are_alike(fake, images_of, monkeypatch):
    """Also for more sizes than there are buffers kept for."""
    measured = []
    monkeypatch.setattr(RowRunner, "_everyone_from", MEASURED)
    monkeypatch.setattr(FakeBackend, "plans_by_batch", False)
    monkeypatch.setattr(rows_module, "fastest_ms", lambda backend, call: measured.append(call) or 1.0)
    runtime = fake(max_batch=64).runtime
    for _ in range(2):
        for n in range(20, 40):
            keep = np.ones((n, K), bool)
            keep[0] = False
            runtime.run(images_of(range(n)), policy=keep)
    n_shapes, n_kinds = 3, 2  # 16 to 31 images, and 32 to 63
    assert len(measured) == 2 * n_shapes * n_kinds  # to move the activation, and to run the block


def test_bindings_of_rows_are_bounded(fake, images_of, fake_oracle, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_CALLS", 5)
    runtime, sizes = fake(max_batch=8).runtime, []
    real = RowRunner._bind_rows

    def bind(rows, part, n_rows):
        bound = real(rows, part, n_rows)
        sizes.append(len(rows._row_calls))
        return bound

    monkeypatch.setattr(RowRunner, "_bind_rows", bind)
    keeps = np.random.default_rng(3).random((10, 8, K)) < 0.5
    for keep in keeps:
        logits = runtime.run(images_of(range(8)), policy=keep).logits[:, 0]
        assert logits.tolist() == [fake_oracle(value, row) for value, row in enumerate(keep)]
    if sizes:  # engines that plan by batch run on all images
        assert max(sizes) == 5


def test_what_a_block_emits_has_memory_of_its_own(fake, images_of, cheaper):
    """Though all of it has one shape: each row keeps its own score and cost."""
    opened, heard = fake(emits=["score", "cost"]), []

    class Listens(MaskController):
        def observe(self, k, emitted):
            heard.append({name: values.copy() for name, values in emitted.items()})

    keep = np.ones((4, K), bool)
    keep[1] = False
    opened.runtime.run_with(images_of(range(4)), Listens(keep, threshold=0.5))
    assert {tuple(emitted) for emitted in heard} == {("score", "cost")}
    assert all((emitted["cost"] == 2 * emitted["score"]).all() for emitted in heard)
    assert all(emitted["score"][1] == 0 for emitted in heard)


@pytest.mark.parametrize(("copy_ms", "expected"), [(0, 8), (100, 5)])  # a block takes 1 ms there: 8 x 201 / 401
def test_costs_on_a_device_are_those_of_the_device(monkeypatch, tmp_path, tiny, preprocessed, copy_ms, expected):
    driver, thresholds = install_gpu(monkeypatch, tmp_path), []
    driver.copy_ms["DtoD"] = copy_ms
    monkeypatch.setattr(
        RowRunner,
        "_everyone_from",
        lambda rows, step, side: thresholds.append(MEASURED(rows, step, side)) or thresholds[-1],
    )
    keep = np.ones((8, 3), bool)
    keep[0, 0] = False
    with Orchestrator.open(tiny.bundle, backend="tensorrt", device="cuda:0", strategy="chain") as runtime:
        runtime.run(preprocessed(tiny.model, 8), policy=keep)
    assert thresholds == [expected]

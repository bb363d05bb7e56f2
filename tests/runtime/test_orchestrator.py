"""The orchestrator on the fake backend: which engines are called, in which order, and what is refused."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bdtool.errors import DataError, EngineError, PolicyError
from bdtool.runtime.controllers import MaskController
from bdtool.runtime.orchestrator import Orchestrator

K = 6


def _bits(text):
    return np.array([bit == "1" for bit in text])


@pytest.mark.parametrize(
    ("bits", "calls"),
    [
        ("111111", ["block_00", "block_01", "block_02", "block_03", "block_04", "block_05"]),
        ("000000", ["shortcut_02", "shortcut_04"]),
        ("101010", ["block_00", "block_02", "block_04"]),
        ("010101", ["block_01", "shortcut_02", "block_03", "shortcut_04", "block_05"]),
    ],
)
def test_kept_blocks_run_in_order_and_dropped_ones_not_at_all(fake, images_of, bits, calls):
    opened = fake()
    opened.runtime.run(images_of([1]), policy=bits)
    assert opened.backend.calls == [(name, 1) for name in ("stem", *calls, "head")]


def test_learned_policy_runs_the_policy_network_first(fake, images_of):
    opened = fake()
    result = opened.runtime.run(images_of([3]))
    assert opened.backend.calls[:2] == [("policy", 1), ("stem", 1)]
    # the fake policy says (value + k) % 3 / 2 for block k, and one half is enough
    assert result.policy.tolist() == [[(3 + k) % 3 / 2 >= 0.5 for k in range(K)]]
    assert opened.backend.calls[2:-1] == [(f"block_{k:02}", 1) for k in (1, 2, 4, 5)]


def test_only_the_images_that_keep_a_block_go_through_it(fake, images_of):
    opened = fake()
    keep = np.stack([_bits("110111"), _bits("010011"), _bits("010011")])
    opened.runtime.run(images_of([1, 2, 3]), policy=keep)
    assert opened.backend.calls == [
        *[("stem", 3), ("block_00", 1), ("block_01", 3), ("shortcut_02", 3), ("block_03", 1), ("block_04", 3)],
        *[("block_05", 3), ("head", 3)],
    ]


@settings(max_examples=60)
@given(data=st.data(), n=st.integers(1, 9))
def test_chain_equals_the_oracle_for_any_keep_matrix(data, n, shared_fake, fake_oracle, images_of):
    """One runtime for all examples: buffers of earlier batches, also of other sizes, must leave no trace."""
    values = data.draw(st.lists(st.integers(0, 96), min_size=n, max_size=n))
    keep = data.draw(hnp.arrays(bool, (n, K)))
    result = shared_fake.runtime.run(images_of(values), policy=keep)
    expected = [[fake_oracle(value, row)] * 2 for value, row in zip(values, keep, strict=True)]
    np.testing.assert_array_equal(result.logits, expected)
    np.testing.assert_array_equal(result.policy, keep)
    np.testing.assert_array_equal(result.blocks_run, keep.sum(axis=1))


@pytest.fixture(scope="module")
def shared_fake(fake):
    return fake(max_batch=5)


@pytest.fixture(scope="module", params=["rows apart", "one batch size", "three at least"])
def shared_halting(fake, request):
    opened = fake(emits=["halt"], min_batch=3 if request.param == "three at least" else 1)
    opened.backend.plans_by_batch = request.param == "one batch size"
    return opened


def test_batch_larger_than_max_batch_runs_in_slices(fake, images_of, fake_oracle):
    opened = fake(max_batch=4)
    values = list(range(10))
    keep = np.random.default_rng(0).random((10, K)) < 0.5
    result = opened.runtime.run(images_of(values), policy=keep)
    assert [n for name, n in opened.backend.calls if name == "stem"] == [4, 4, 2]
    assert result.logits[:, 0].tolist() == [fake_oracle(v, row) for v, row in zip(values, keep, strict=True)]
    np.testing.assert_array_equal(result.policy, keep)


def test_results_of_earlier_runs_stay_as_they_were(fake, images_of):
    runtime = fake().runtime
    first = runtime.run(images_of([1, 2]))
    logits, policy = first.logits.copy(), first.policy.copy()
    runtime.run(images_of([40, 41]), policy="none")
    np.testing.assert_array_equal(first.logits, logits)
    np.testing.assert_array_equal(first.policy, policy)


def test_many_batch_sizes_one_after_the_other_give_right_answers(fake, images_of, fake_oracle):
    runtime = fake(max_batch=32).runtime
    for n in [*range(1, 13), 1, 2, 12]:  # more sizes than the chain keeps buffers for
        result = runtime.run(images_of(range(n)), policy="110101")
        assert result.logits[:, 0].tolist() == [fake_oracle(v, _bits("110101")) for v in range(n)]


@pytest.mark.parametrize(
    ("policy", "bits"),
    [
        ("all", "111111"),
        ("none", "000000"),
        ("first:2", "110000"),
        ("distribute:3", "101010"),
        ("100001", "100001"),
        ([0, 1, 0, 1, 0, 1], "010101"),
        (np.array([True] * 3 + [False] * 3), "111000"),
        (np.array([[1.0, 0, 0, 0, 0, 0]] * 2), "100000"),
    ],
)
def test_every_form_of_policy_is_taken(fake, images_of, policy, bits):
    result = fake().runtime.run(images_of([1, 2]), policy=policy)
    assert result.policy.tolist() == [_bits(bits).tolist()] * 2


def test_none_is_learned_with_a_policy_network_and_all_without(fake, images_of):
    for policy in (None, "learned"):
        opened = fake()
        opened.runtime.run(images_of([1]), policy=policy)
        assert ("policy", 1) in opened.backend.calls
    assert fake(has_policy=False).runtime.run(images_of([1])).policy.all()
    with pytest.raises(PolicyError, match="'learned': the model has no policy network"):
        fake(has_policy=False).runtime.run(images_of([1]), policy="learned")


@pytest.mark.parametrize("policy", ["1010", "sometimes", "first:7", [1, 0, 1], [[1] * K] * 3, [2] * K, [0.5] * K])
def test_policy_that_does_not_fit_is_refused_before_anything_runs(fake, images_of, policy):
    opened = fake()
    with pytest.raises(PolicyError):
        opened.runtime.run(images_of([1, 2]), policy=policy)
    assert opened.backend.calls == []


def test_policy_cost_can_be_had_with_given_bits(fake, images_of):
    opened = fake()
    result = opened.runtime.run_with_policy_cost(images_of([1]), _bits("000000")[None])
    assert [name for name, _ in opened.backend.calls] == ["policy", "stem", "shortcut_02", "shortcut_04", "head"]
    assert not result.policy.any()


def test_full_runs_one_engine_and_reports_every_block(fake, images_of):
    opened = fake(strategy="full")
    for policy in (None, "all", "1" * K, np.ones((2, K), bool)):
        result = opened.runtime.run(images_of([5, 7]), policy=policy)
        assert result.policy.all()
        assert result.logits[:, 0].tolist() == [5, 7]
    assert opened.backend.calls == [("full", 2)] * 4


@pytest.mark.parametrize("policy", ["learned", "none", "0" + "1" * (K - 1), [1] * (K - 1) + [0], np.zeros(K)])
def test_full_takes_no_policy_that_drops_a_block(fake, images_of, policy):
    with pytest.raises(PolicyError, match=r"strategy 'full' runs every block; choose another, such as 'chain'"):
        fake(strategy="full").runtime.run(images_of([1]), policy=policy)


class StopsWhenTold:
    """Like ACT (Graves 2016): an image runs on until the score its last block emitted is at least `limit`."""

    mask = None  # the bits are found on the way

    def __init__(self, limit):
        self._limit = limit
        self.seen = []

    def begin(self, n_images, probabilities):
        self._running = np.ones(n_images, dtype=bool)
        self._columns = []

    def keep(self, k):
        self._columns.append(self._running.copy())
        return self._columns[-1]

    def observe(self, k, emitted):
        score = emitted["halt"][:, 0].copy()
        self.seen.append((k, score.tolist()))
        self._running &= score < self._limit

    @property
    def matrix(self):
        return np.stack(self._columns, axis=1)


def _halting_rows(values, limit):
    """Oracle for `StopsWhenTold`: the keep matrix, and the scores seen block by block."""
    from engines.fake import fake_value

    v = np.asarray(fake_value("stem", 0, np.array(values, float)))
    running, rows, seen = np.ones(len(values), bool), [], []
    for k in range(K):
        rows.append(running.copy())
        score = np.where(running, fake_value("block", k, v), 0)
        dropped = fake_value("shortcut", k, v) if k in (2, 4) else v
        v = np.where(running, score, dropped)
        if running.any():
            seen.append((k, score.tolist()))
        running &= score < limit
    return np.stack(rows, axis=1), seen, v


@settings(max_examples=40)
@given(values=st.lists(st.integers(0, 96), min_size=1, max_size=4), limit=st.integers(0, 97))
def test_controller_that_learns_as_it_goes_hears_what_blocks_emit(values, limit, shared_halting, images_of):
    controller = StopsWhenTold(limit)
    result = shared_halting.runtime.run_with(images_of(values), controller)
    matrix, seen, v = _halting_rows(values, limit)
    np.testing.assert_array_equal(result.policy, matrix)
    assert controller.seen == seen
    np.testing.assert_array_equal(result.logits[:, 0], v)


def _every_block(n):
    return MaskController(np.ones((n, K), bool), threshold=0.5)


def test_controller_decides_for_the_images_that_run(fake, images_of):
    runtime = fake(max_batch=4).runtime
    with pytest.raises(DataError, match=r"got 5, one controller decides for at most 4"):
        runtime.run_with(images_of(range(5)), _every_block(5))
    with pytest.raises(PolicyError, match=r"has keep bits for 3 images, 4 run"):
        runtime.run_with(images_of(range(4)), _every_block(3))


def test_controller_may_ask_the_policy_network_but_run_nothing(fake, images_of):
    runtime, images = fake().runtime, images_of([1, 2])
    expected = runtime.run_with(images, _every_block(2)).logits

    class Asks(MaskController):
        def keep(self, k):
            runtime.decide(images_of([3, 4]))
            if k == 3:
                with pytest.raises(EngineError, match="a controller ran images on the runtime that was asking it"):
                    runtime.run(images_of([5, 6]))
            return super().keep(k)

    asks = Asks(np.ones((2, K), bool), threshold=0.5)
    np.testing.assert_array_equal(runtime.run_with(images, asks).logits, expected)
    np.testing.assert_array_equal(runtime.run(images, policy="all").logits, expected)  # the next turn is free


def test_missing_batch_axis_is_no_error_of_the_policy(tiny, pixels):
    with Orchestrator.open(tiny.bundle) as runtime:
        with pytest.raises(DataError, match=r"One image needs a batch axis"):
            runtime.run(pixels(tiny.model, 2)[0], policy=np.ones((1, 3)))
        with pytest.raises(DataError, match="expected at least one image"):
            runtime.run(pixels(tiny.model, 2)[:0], policy=np.ones((0, 3)))
        with pytest.raises(DataError, match=r"got uint8 \[\], expected"):
            runtime.run(np.array(5, np.uint8))


@pytest.mark.parametrize(("policy", "message"), [(np.ones((2, 4)), r"\[2, 4\]"), (np.ones((1, 3)), "got 1 rows for 2")])
def test_policy_of_another_shape_costs_nothing(tiny, pixels, policy, message):
    with Orchestrator.open(tiny.bundle) as runtime:
        with pytest.raises(PolicyError, match=message):
            runtime.run_with_policy_cost(pixels(tiny.model, 2), policy)
        assert runtime.run_with_policy_cost(pixels(tiny.model, 2), np.array([1, 0, 1])).blocks_run.tolist() == [2, 2]


def test_block_that_nobody_keeps_is_not_called_whatever_form_the_answer_has(fake, images_of):
    class Nobody(StopsWhenTold):
        def keep(self, k):
            super().keep(k)
            self._columns[-1][:] = False
            return [np.zeros(2, bool), np.bool_(False), False][k % 3]

    opened = fake()
    opened.runtime.run_with(images_of([1, 2]), Nobody(limit=1))
    assert opened.backend.calls == [("stem", 2), ("shortcut_02", 2), ("shortcut_04", 2), ("head", 2)]


@pytest.mark.parametrize(("strategy", "part"), [("chain", "head"), ("full", "full")])
def test_logits_that_are_not_finite_name_the_image(fake, images_of, strategy, part):
    opened = fake(strategy=strategy)
    opened.backend.not_finite = {part}
    with pytest.raises(EngineError, match=r"the logits of image 0 are not finite \(2 of 2 images\).*bdtool verify"):
        opened.runtime.run(images_of([1, 2]))


def test_image_named_is_counted_over_the_whole_batch(fake, images_of):
    values = [1.0] * 10
    values[6] = np.nan
    with pytest.raises(EngineError, match=r"the logits of image 6 are not finite \(1 of 4 images\)"):
        fake(max_batch=4).runtime.run(images_of(values), policy="all")


def test_policy_network_that_gives_nan_decides_nothing(fake, images_of, monkeypatch):
    opened = fake()
    engine = opened.runtime.engine(opened.runtime.network.part("policy"))
    nan = {"keep_probability": np.full((1, K), np.nan, np.float32)}
    monkeypatch.setattr(type(engine), "run", lambda self, feeds: nan)
    for use in (opened.runtime.decide, opened.runtime.keep_probability):
        with pytest.raises(EngineError, match="probabilities are not finite"):
            use(images_of([1]))


def test_probability_at_the_threshold_keeps_a_block_wherever_it_is_asked_for(fake, images_of):
    runtime, images = fake().runtime, images_of([1, 2, 3])
    probability = runtime.keep_probability(images)
    assert {0, 0.5, 1} == set(probability.ravel())
    for keep in (runtime.decide(images), runtime.run(images).policy):
        np.testing.assert_array_equal(keep, probability >= 0.5)


def test_probabilities_of_many_images_come_in_slices(fake, images_of):
    opened = fake(max_batch=4)
    together = opened.runtime.keep_probability(images_of(range(10)))
    assert [n_images for _, n_images in opened.backend.calls] == [4, 4, 2]
    np.testing.assert_array_equal(
        together, np.concatenate([opened.runtime.keep_probability(images_of([i])) for i in range(10)])
    )


def test_closed_orchestrator_refuses_to_run(fake, images_of):
    with fake().runtime as runtime:
        runtime.run(images_of([1]))
    with pytest.raises(ValueError, match="this orchestrator was closed; open the bundle again"):
        runtime.run(images_of([1]))


def test_timed_orchestrator_sees_every_call_of_one_image(fake, images_of):
    opened, seen = fake(), []

    def wrap(part, call):
        return lambda: (seen.append(part.name), call())

    timed = opened.runtime.timed(wrap)
    result = timed.run(images_of([1]), policy="010101")
    assert seen == [name for name, _ in opened.backend.calls]
    np.testing.assert_array_equal(result.logits, opened.runtime.run(images_of([1]), policy="010101").logits)


def test_strategy_without_a_policy_network_gives_no_probabilities(tiny, pixels):
    refused = pytest.raises(PolicyError, match="strategy 'full' loads no policy network; open the bundle with 'chain'")
    with Orchestrator.open(tiny.bundle, strategy="full") as runtime, refused:
        runtime.keep_probability(pixels(tiny.model, 1))


def test_bundle_without_a_policy_network_gives_no_probabilities(fake, images_of):
    with pytest.raises(PolicyError, match="the bundle has no policy network; give a POLICY"):
        fake(has_policy=False).runtime.decide(images_of([1]))


def test_nothing_is_left_of_a_closed_orchestrator(fake, images_of):
    runtime, backend = (opened := fake()).runtime, weakref.ref(opened.backend)
    part = runtime.network.part("block_00")
    runtime.close()
    for use in (lambda: runtime.decide(images_of([1])), lambda: runtime.engine(part), lambda: runtime.timed(_as_it_is)):
        with pytest.raises(ValueError, match="this orchestrator was closed; open the bundle again"):
            use()
    with pytest.raises(ValueError, match="was closed"), runtime:
        pass
    del opened
    gc.collect()
    assert backend() is None
    assert runtime.threads == 1


def _as_it_is(part, call):
    return call


def test_result_compares_by_identity(fake, images_of):
    runtime = fake().runtime
    first, second = runtime.run(images_of([1])), runtime.run(images_of([1]))
    assert first == first
    assert first != second
    assert len({first, second}) == 2

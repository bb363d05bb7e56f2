"""The greedy choice gives back what hurts most for the least time, and stops as soon as the bound is kept."""

import pytest

from calibration.mixed import BlockSensitivity, choose_precisions


def _row(block, error, ms, fp32_ms=1.0, precision="int8", spread=0.0):
    return BlockSensitivity(
        block=block,
        precision=precision,
        accuracy_drop=0.0,
        changed_classes=0.0,
        policy_flips=0.0,
        logits_error=error,
        fp32_ms=fp32_ms,
        ratio_to_fp32=ms / fp32_ms,
        ratio_to_fp32_iqr=(ms / fp32_ms - spread, ms / fp32_ms + spread),
    )


ROWS = [_row("a", 0.1, 0.5), _row("b", 0.4, 0.5), _row("c", 0.1, 0.9), _row("slow", 0.0, 1.5)]
_MS = {"fp16": {"a": 0.6, "b": 0.4}, "int8": {"a": 0.5, "b": 0.7}}
DROPS = {"a": 0.1, "b": 0.3, "c": 0.4}


def _drop(chosen):
    return sum(DROPS[block] for block in chosen)


def test_everything_is_taken_where_the_bound_allows_it():
    choice = choose_precisions(ROWS, _drop, max_accuracy_drop=1.0)
    assert set(choice.precisions) == {"a", "b", "c"}  # not the one that is slower in int8
    assert len(choice.steps) == 1


def test_each_block_takes_the_precision_that_is_fastest_for_it():
    rows = [_row(block, 0.1, ms, precision=name) for name in ("fp16", "int8") for block, ms in _MS[name].items()]
    for order in (rows, rows[::-1]):
        choice = choose_precisions(order, lambda chosen: 0.0, max_accuracy_drop=1.0)
        assert choice.precisions == {"a": "int8", "b": "fp16"}


def test_what_saves_less_than_noise_stays_fp32():
    rows = [_row("a", 0.1, 0.97), _row("b", 0.1, 0.99), _row("c", 0.1, 1.1)]
    choice = choose_precisions(rows, lambda chosen: 0.0, max_accuracy_drop=1.0)
    assert (choice.precisions, choice.not_faster) == ({"a": "int8"}, ("b", "c"))


def test_what_is_not_measurably_faster_stays_fp32():
    rows = [_row("a", 0.1, 0.9, spread=0.05), _row("b", 0.1, 0.9, spread=0.15), _row("c", 0.1, 0.7, spread=0.35)]
    choice = choose_precisions(rows, lambda chosen: 0.0, max_accuracy_drop=1.0)
    assert (choice.precisions, choice.not_faster) == ({"a": "int8"}, ("b", "c"))
    assert [row.to_json()["is_faster"] for row in rows] == [True, False, False]


@pytest.mark.parametrize(("ms", "spread", "is_faster"), [(0.98, 0.0, True), (0.75, 0.25, False)])
def test_saving_just_enough_is_enough_and_a_quartile_of_one_is_not(ms, spread, is_faster):
    assert _row("a", 0.1, ms, spread=spread).is_faster is is_faster


def test_times_in_the_table_are_those_of_the_choice():
    figures = _row("a", 0.1, 1.5, fp32_ms=2.0).to_json()
    assert (figures["ratio_to_fp32"], figures["ms"], figures["saved_ms"]) == (0.75, 1.5, 0.5)


def test_the_worst_error_for_each_millisecond_goes_first():
    choice = choose_precisions(ROWS, _drop, max_accuracy_drop=0.4)
    assert set(choice.precisions) == {"a", "b"}
    assert choice.steps[0]["given_back"] == "c"
    choice = choose_precisions(ROWS, _drop, max_accuracy_drop=0.2)
    assert set(choice.precisions) == {"a"}
    assert choice.accuracy_drop == 0.1
    assert [(step["n_lower"], step.get("given_back")) for step in choice.steps] == [(3, "c"), (2, "b"), (1, None)]
    assert [step["accuracy_drop"] for step in choice.steps] == pytest.approx([0.8, 0.4, 0.1])


def test_nothing_is_left_where_nothing_is_allowed():
    choice = choose_precisions(ROWS, lambda chosen: 1.0 if chosen else 0.0, max_accuracy_drop=0.0)
    assert choice.precisions == {}
    assert choice.accuracy_drop == 0.0

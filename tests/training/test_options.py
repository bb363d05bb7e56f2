"""What a run can be asked to do: which options are refused, and how learning rates run."""

import pytest

from bdtool.errors import UsageError
from bdtool.training.options import CurriculumOptions, FinetuneOptions, PretrainOptions, TrainOptions
from bdtool.training.trainer import schedule_factor

_NAN, _INF = float("nan"), float("inf")


@pytest.mark.parametrize("schedule", ["constant", "one-cycle", "cosine", "step"])
def test_schedules_peak_at_one_and_never_rise_again(schedule: str) -> None:
    factors = [schedule_factor(schedule, 100)(step) for step in range(101)]
    peak = factors.index(max(factors))
    assert max(factors) == pytest.approx(1, abs=0.02)
    assert all(later <= earlier for earlier, later in zip(factors[peak:], factors[peak + 1 :], strict=False))
    assert (factors[-1] < 0.02) == (schedule != "constant")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 1, 50: 1, 99: 1}),
        ("one-cycle", {0: 0.1, 5: 0.4, 15: 1, 100: 0}),
        ("cosine", {0: 1, 50: 0.5, 100: 0}),
        ("step", {0: 1, 49: 1, 50: 0.1, 74: 0.1, 75: 0.01, 99: 0.01}),
    ],
)
def test_schedules_run_as_they_say(schedule: str, expected: dict[int, float]) -> None:
    factor = schedule_factor(schedule, 100)
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong", [{"epochs": value} for value in (0, _NAN, _INF)] + [{"batch": 1}] + [{"lr": v} for v in (0, _NAN, _INF)]
)
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="expected a finite number of epochs above 0, a batch of at least 2 and a fin"):
        TrainOptions(**{"epochs": 1, "lr": 0.1, **wrong})


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (CurriculumOptions, "stage_epochs", (0, _NAN, _INF)),
        (CurriculumOptions, "stage_blocks", (0,)),
        (FinetuneOptions, "base_lr", (0, _NAN, _INF)),
    ]
    + [(kind, "gamma", (-1, _NAN, _INF)) for kind in (CurriculumOptions, FinetuneOptions)]
    + [(kind, "alpha", (0.5, 1, _NAN)) for kind in (CurriculumOptions, FinetuneOptions)],
)
def test_impossible_options_of_a_stage_are_refused(
    kind: type[TrainOptions], name: str, values: tuple[float, ...]
) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"{name} {value}.*: expected "):
            kind(**{name: value})


def test_run_has_a_step_at_least() -> None:
    assert PretrainOptions(epochs=0.01).n_steps(8) == 1

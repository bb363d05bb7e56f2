"""`imitate` killed, interrupted and gone on with: in each of its parts, as the stages that go by epochs."""

import dataclasses
import itertools
import os
import signal
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from bdtool.errors import DataError, TrainingError, UsageError
from bdtool.models.model import BlockDropModel
from bdtool.training.options import ImitateOptions
from bdtool.training.place import TrainingPlace
from bdtool.training.stages import Trained, imitate
from bdtool.training.stopping import Interrupted

# two masks of two pieces of judges each, 3 and 2 paths a piece; two batches of the 256 images; twelve steps
_QUICK = {"epochs": 3, "batch": 64, "fewest": 1, "most": 3, "judges": 70, "hidden": 8}
_IN_A_PART = {
    "0 of 2 masks and 61.0% of the next": 0.1 * 64 / 70 * 2 / 3,
    "1 of 2 masks and 95.7% of the next": 0.1 + 0.1 * (64 + 6 / 2) / 70,
    "losses and features of 250 of 256 images": 0.2 + 0.6 * 250 / 256,
    "step 5 of 12 of the policy network": 0.8 + 0.2 * 5 / 12,
}
Run = Callable[..., Trained]


@pytest.fixture
def run(random_model: Callable[..., BlockDropModel]) -> Run:
    """Return a function that imitates where it is told: the first call of a test and the second one start alike."""

    def imitate_at(place: TrainingPlace, **options: object) -> Trained:
        start, trunk = random_model("resnet8", has_policy=False), random_model("resnet8", has_policy=False, seed=5)
        return imitate(start, ImitateOptions(**{**_QUICK, **options}), place, trunk=trunk)

    return imitate_at


def die() -> None:
    raise RuntimeError("killed")


def at_share(share: float, action: Callable[[], None]) -> Callable[[float, str], None]:
    return lambda done, part: action() if done == pytest.approx(share) else None


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("share", [*_IN_A_PART.values(), 0.2, 0.8])
def test_run_after_a_kill_ends_like_an_unbroken_one(
    share: float, run: Run, place: Callable[..., TrainingPlace]
) -> None:
    run(place("unbroken"))
    with pytest.raises(RuntimeError, match="killed"):
        run(place("broken", save_every_s=0, on_progress=at_share(share, die)))
    assert not place("broken").output.exists()
    shares: list[float] = []
    run(place("broken", resume=True, on_progress=lambda done, part: shares.append(done)))
    assert 0 < shares[0] < share, "it went on from the piece before the kill"
    assert shares[1] == pytest.approx(share), "no piece was done twice"
    assert not place("broken").checkpoint.exists()
    assert place("broken").output.read_bytes() == place("unbroken").output.read_bytes()


@pytest.mark.parametrize(("where", "share"), _IN_A_PART.items())
def test_a_signal_saves_first(where: str, share: float, run: Run, place: Callable[..., TrainingPlace]) -> None:
    asked = place(val=None, on_progress=at_share(share, interrupt))
    with pytest.raises(Interrupted, match=f"stopped after {where}; the same command with --resume goes on"):
        run(asked)
    resumed: list[str] = []
    run(place(val=None, resume=True, on_resume=resumed.append))
    assert resumed == [where]
    assert asked.output.exists()


def test_a_signal_breaks_the_measurement_off(run: Run, place: Callable[..., TrainingPlace]) -> None:
    source, given = place().train, itertools.count()

    def image_at(index: int) -> np.ndarray:
        if next(given) == 5:
            interrupt()
        return source.image_at(index)

    asked = place(val=dataclasses.replace(source, image_at=image_at))
    with pytest.raises(Interrupted, match="stopped after step 12 of 12 of the policy network"):
        run(asked)
    assert not asked.output.exists()
    trained = run(place(resume=True))
    unbroken = run(place("unbroken"))
    assert trained.figures == unbroken.figures
    assert asked.output.read_bytes() == place("unbroken").output.read_bytes()


def test_images_that_cannot_be_measured_on_lose_nothing(run: Run, place: Callable[..., TrainingPlace]) -> None:
    def image_at(index: int) -> np.ndarray:
        raise DataError("a damaged picture")

    with pytest.raises(DataError, match="a damaged picture"):
        run(place(val=dataclasses.replace(place().train, image_at=image_at)))
    shares: list[float] = []
    trained = run(place(val=None, resume=True, on_progress=lambda done, part: shares.append(done)))
    assert shares == [1.0]
    assert trained.figures == {}
    assert "figures" not in trained.model.spec.provenance


def test_little_is_written_between_checkpoints(
    run: Run, place: Callable[..., TrainingPlace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10, 2 and 12 pieces of 10 seconds each sixth, the first behind 50 seconds, is saved."""
    written: list[object] = []
    monkeypatch.setattr("bdtool.training.pieces.write_progress", lambda path, state: written.append(state))
    clock = SimpleNamespace(monotonic=itertools.count(step=10).__next__)
    monkeypatch.setattr("bdtool.training.pieces.time", clock)
    run(place(val=None, save_every_s=50))
    assert len(written) == 4
    run(place("always", val=None, save_every_s=0))
    assert len(written) == 4 + 10 + 2 + 12


@pytest.fixture
def unfinished(run: Run, place: Callable[..., TrainingPlace]) -> TrainingPlace:
    with pytest.raises(Interrupted):
        run(place(val=None, on_progress=at_share(0.1, interrupt)))
    return place(val=None, resume=True)


@pytest.mark.parametrize(
    ("options", "named"), [({"judges": 64}, r"judges was 70, is 64"), ({"lr": 0.1}, r"lr was 0\.003, is 0\.1")]
)
def test_checkpoint_of_other_options_is_refused_by_name(
    options: dict[str, float], named: str, run: Run, unfinished: TrainingPlace
) -> None:
    before = unfinished.checkpoint.read_bytes()
    with pytest.raises(TrainingError, match=rf"asked for otherwise \({named}\); use the same options"):
        run(unfinished, **options)
    assert unfinished.checkpoint.read_bytes() == before


def test_checkpoint_of_another_model_is_refused(run: Run, unfinished: TrainingPlace) -> None:
    with pytest.raises(TrainingError, match=r"asked for otherwise \(start was '', is 'another digest'\)"):
        run(dataclasses.replace(unfinished, start="another digest"))


def test_checkpoint_of_other_data_is_refused(run: Run, unfinished: TrainingPlace) -> None:
    labels = unfinished.train.labels
    assert labels is not None
    other = dataclasses.replace(unfinished.train, labels=labels[::-1].copy())
    with pytest.raises(TrainingError, match=r"asked for otherwise \(sha256 was"):
        run(dataclasses.replace(unfinished, train=other))


def test_an_unfinished_run_is_not_started_over(run: Run, unfinished: TrainingPlace) -> None:
    with pytest.raises(UsageError, match=r"holds an unfinished run: add --resume to go on with it, or remove it"):
        run(dataclasses.replace(unfinished, resume=False))
    assert unfinished.checkpoint.exists()


def test_a_finished_run_is_not_trained_again_by_resume(run: Run, place: Callable[..., TrainingPlace]) -> None:
    run(place(val=None, resume=True))  # nothing is there yet: it starts
    before = place().output.read_bytes()
    with pytest.raises(UsageError, match=r"nothing to go on with: .*model.safetensors is there, and no unfinished run"):
        run(place(resume=True))
    assert place().output.read_bytes() == before

"""Training on a GPU, which is a stand-in: what lies on it and what on the host never meet but in copies."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bdtool.models.model import BlockDropModel
from bdtool.models.store import load_model
from bdtool.training.distributed import Group
from bdtool.training.options import CurriculumOptions, FinetuneOptions, ImitateOptions, PretrainOptions
from bdtool.training.place import TrainingPlace
from bdtool.training.stages import Trained, curriculum, finetune, imitate, pretrain
from bdtool.training.trainer import Report
from tests.training.host_gpu import DEVICE, HostGpu

_FAST = {"epochs": 1.5, "batch": 16, "limit": 64, "amp": "off"}  # 6 steps
Make = Callable[..., BlockDropModel]

STAGES: dict[str, Callable[[Make, TrainingPlace], Trained]] = {
    "pretrain": lambda make, place: pretrain(make("resnet8").spec, PretrainOptions(**_FAST), place),
    "curriculum": lambda make, place: curriculum(make("resnet8"), CurriculumOptions(**_FAST), place),
    "bfloat16": lambda make, place: curriculum(make("resnet8"), CurriculumOptions(**{**_FAST, "amp": "bf16"}), place),
    "finetune": lambda make, place: finetune(make("resnet8"), FinetuneOptions(**_FAST), place),
    "frozen policy, teacher": lambda make, place: finetune(
        make("resnet8"),
        FinetuneOptions(**_FAST, freeze_policy=True, policy="learned:0.1-0.95", blocks=1.5),
        place,
        teacher=make("resnet14", has_policy=False),
    ),
    "heuristic": lambda make, place: finetune(make("resnet8"), FinetuneOptions(**_FAST, policy="random:2"), place),
    "masks": lambda make, place: imitated(make, place),
    "imitate": lambda make, place: imitated(make, place),
}
_BREAK_AT = {"masks": 0.15, "imitate": 0.9}  # a share of the run


def imitated(make: Make, place: TrainingPlace) -> Trained:
    options = ImitateOptions(epochs=1.5, batch=16, limit=66, judges=65)
    return imitate(make("resnet8", has_policy=False), options, place)


@pytest.mark.parametrize("name", STAGES)
def test_run_with_a_break_on_a_gpu_ends_like_one_on_the_cpu(
    name: str, place: Callable[..., TrainingPlace], random_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, gpu, val = STAGES[name], HostGpu(monkeypatch), place().val.drawn(64)
    on_cpu = stage(random_model, place("on-cpu", val=val))
    there = place("on-gpu", val=val, group=Group(rank=0, size=1, device=DEVICE), save_every_s=0)
    on_progress = die_at_share(_BREAK_AT.get(name, 1))
    with gpu.running():
        with pytest.raises(RuntimeError, match="killed"):
            stage(random_model, dataclasses.replace(there, on_step=die_at_5, on_progress=on_progress))
        on_gpu = stage(random_model, dataclasses.replace(there, resume=True))
    assert on_gpu.figures.keys() == on_cpu.figures.keys()
    expected, got = (weights(run.output) for run in (place("on-cpu"), there))
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, atol=1e-4, rtol=1e-3, msg=key)


def test_what_lies_on_both_is_refused_by_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with HostGpu(monkeypatch).running():
        here = torch.ones(3)
        there = here.to(DEVICE)
        assert (here.device.type, there.device, (there * 2).device) == ("cpu", DEVICE, DEVICE)
        assert (there + torch.ones(())).cpu().numpy().sum() == 6
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            here + there
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            here[there.long()]
        with pytest.raises(TypeError, match="can't convert"):
            there.numpy()


def die_at_5(report: Report) -> None:
    if report.step == 5:
        raise RuntimeError("killed")


def die_at_share(least: float) -> Callable[[float, str], None]:
    def on_progress(share: float, name: str) -> None:
        if share > least:
            raise RuntimeError("killed")

    return on_progress


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path).state_dict()

"""`benchmarks/table1.py`: every row's commands are ones that bdtool takes, in an order that can run."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bdtool.models.shipped import shipped_models
from bdtool.models.store import load_model, save_model
from benchmarks import table1
from tests.command_line import parse

MASK = "100010001011110"


class Commands:
    """Stands for `subprocess.run`: checks commands as the command line does, and writes their output."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.policies: list[str] = []

    def __call__(self, words: list[str], **_: Any) -> Any:
        context = parse(words[3:])  # behind `python -m bdtool`
        name, params = context.info_name, context.params
        self.seen.append(name)
        output = params.get("output") or params.get("bundle")
        if name == "export":
            Path(output).mkdir()
        elif name == "imitate":
            model = load_model(shipped_models()["r32-cifar10"])
            model.spec = dataclasses.replace(model.spec, provenance={"masks": {"7": MASK}})
            save_model(model, Path(output))
        elif name == "evaluate":
            self.policies += params["policies"]
        elif name == "finetune":
            self.policies.append(params["policy"])
        if name not in ("export", "imitate", "build", "evaluate"):
            shutil.copy(shipped_models()["r32-cifar10"], output)
        figures = {"accuracy": 0.5, "blocks_mean": 7.0, "flops_mean": 1.0, "full_flops": 2.0}
        return subprocess.CompletedProcess(words, 0, stdout=json.dumps(figures))


@pytest.fixture
def commands():
    return Commands()


@pytest.fixture
def measure(tmp_path, monkeypatch, commands):
    monkeypatch.setattr(table1.subprocess, "run", commands)
    shutil.copy(shipped_models()["r32-cifar10"], tmp_path / "teacher.safetensors")

    def run(policy: str, *, finetuned: bool) -> list[str]:
        commands.seen.clear()
        table1.Row("resnet32", tmp_path, data="train.npz", val="test.npz", device="cpu").measure(
            policy, finetuned=finetuned
        )
        return [name for name in commands.seen if name not in ("export", "build", "evaluate")]

    return run


def test_the_shipped_model_goes_through_every_stage(measure):
    stages = ["pretrain", "finetune", "finetune", "pretrain", "imitate", "curriculum", "finetune", "finetune"]
    assert measure("taught", finetuned=True) == stages
    assert measure("halved", finetuned=True) == ["pretrain", "imitate", "finetune"]  # beside what is there
    assert measure("one-mask-taught", finetuned=True) == ["finetune"]


def test_teacher_that_is_not_there_is_asked_for(measure, tmp_path):
    (tmp_path / "teacher.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"teacher\.safetensors: none there; make it with bdtool import"):
        measure("taught", finetuned=True)


def test_heuristics_start_from_the_same_base(measure):
    measure("warm-started", finetuned=True)
    assert measure("distribute", finetuned=True) == ["finetune"]


def test_one_mask_is_the_one_that_imitate_found(measure, commands):
    assert measure("one-mask", finetuned=True)[-1] == "finetune"
    assert commands.policies[-2:] == [MASK, MASK]


def test_policy_without_masks_says_what_to_do(measure, tmp_path):
    shutil.copy(shipped_models()["r32-cifar10"], tmp_path / "imitated-policy.safetensors")
    with pytest.raises(SystemExit, match=r"imitated-policy\.safetensors: was made before .*; remove it"):
        measure("one-mask", finetuned=False)


@pytest.mark.parametrize("finetuned", [False, True])
@pytest.mark.parametrize("policy", table1.POLICIES)
def test_bdtool_takes_the_commands_of_each_row(measure, policy, finetuned):
    assert measure(policy, finetuned=finetuned)[0] == "pretrain"

"""Two processes, gloo on the CPU, started as users start them: by torchrun."""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bdtool.errors import UsageError
from bdtool.models.store import load_model
from bdtool.training.distributed import Group, open_group, synchronize_batch_norms
from export.files import exclusive_lock

_GRADIENTS = '''
"""Writes the gradient of one batch's policy loss; alone, or as one of several processes."""
import sys
from pathlib import Path

import torch

from bdtool.models.store import load_model
from bdtool.training.distributed import open_group, synchronize_batch_norms
from bdtool.training.options import CurriculumOptions
from bdtool.training.policy_gradient import bound_probability
from bdtool.training.tasks import CurriculumTask, Step

model = load_model(Path(sys.argv[1]))
inputs = torch.load(sys.argv[2])
with open_group(torch.device("cpu")) as group:
    if group.size > 1:
        synchronize_batch_norms(model.policy)
    task = CurriculumTask(model, CurriculumOptions(), amp=False)
    module = group.wrap(task.module)
    task.begin_step(Step(10**6, 1, torch.arange(16)))
    outcome = module(*(part[group.rank :: group.size] for part in inputs))
    outcome.loss.backward()
    if group.is_first:
        found = {name: p.grad for name, p in model.policy.named_parameters()}
        found |= {name: b for name, b in model.policy.named_buffers()}
        torch.save(found, sys.argv[3])
'''


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The second of two processes with NCCL, which is not there: the names of what it would be called for."""
    found: list[str] = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(f"set_device {device}"))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *arguments, name=name, **options: found.append(name))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    return found


def test_each_process_takes_a_gpu_of_its_own(calls: list[str]) -> None:
    with open_group(torch.device("cuda")) as group:
        assert (group.rank, group.size, group.device) == (1, 2, torch.device("cuda:1"))
    assert calls == ["set_device cuda:1", "init_process_group", "destroy_process_group"]


def test_more_processes_than_gpus_are_refused(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = "process 2 of this machine needs a GPU of its own, torch sees 1 GPU; give --nproc-per-node 1"
    with pytest.raises(UsageError, match=said), open_group(torch.device("cuda")):
        pass
    assert calls == []


def test_one_gpu_for_all_processes_is_refused(calls: list[str]) -> None:
    said = "device cuda:1: under torchrun each process takes a GPU of its own, .* give --device cuda, "
    with pytest.raises(UsageError, match=said), open_group(torch.device("cuda:1")):
        pass
    assert calls == []


def test_others_wait_while_the_first_reads_a_large_data_set(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy network's paths of ImageNet's 1.3 million pictures take half an hour; NCCL waits 10 minutes."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    with open_group(torch.device("cuda")):
        pass
    assert asked["backend"] == "nccl"
    assert asked["timeout"] > timedelta(hours=6)


def test_process_that_fails_does_not_wait_for_the_others(calls: list[str]) -> None:
    with pytest.raises(ValueError, match="a damaged picture"), open_group(torch.device("cuda")):
        raise ValueError("a damaged picture")
    assert calls == ["set_device cuda:1", "init_process_group"]


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_wrapping_a_module_asks_for_nothing_deprecated() -> None:
    with warnings.catch_warnings(action="error"):
        wrapped = Group(rank=0, size=2, device=torch.device("cpu")).wrap(nn.BatchNorm2d(3))
    assert wrapped.broadcast_buffers


@pytest.mark.usefixtures("alone")
def test_shared_batch_norm_of_one_process_is_the_plain_one_and_asks_for_nothing_deprecated() -> None:
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    plain = nn.Sequential(nn.BatchNorm2d(3))
    shared = copy.deepcopy(plain)
    synchronize_batch_norms(shared)
    outputs = []
    for module in (plain, shared):
        x = images.clone().requires_grad_()
        with warnings.catch_warnings(action="error"):
            y = module(x)
            (y**3).sum().backward()
        outputs.append((y, x.grad, module[0].weight.grad, module[0].running_var))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def run(*words: object, processes: int = 1) -> None:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run([*launch, *map(str, words)], check=True, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_gradient_of_two_processes_is_that_of_one(random_model: Callable[..., Any], tmp_path: Path) -> None:
    from bdtool.models.store import save_model

    save_model(random_model("resnet8"), tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 10
    inputs = (torch.randn(16, 3, 32, 32, generator=generator), labels, torch.rand(16, 3, generator=generator))
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "gradients.py").write_text(_GRADIENTS)
    for processes in (1, 2):
        run(
            tmp_path / "gradients.py",
            tmp_path / "model.safetensors",
            tmp_path / "inputs.pt",
            tmp_path / f"{processes}.pt",
            processes=processes,
        )
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert one.keys() == two.keys()
    scale = max(float(tensor.abs().max()) for name, tensor in one.items() if "running" not in name)
    assert scale > 0.01, "a gradient of nearly zero shows nothing"
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, atol=1e-4 * scale, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_torchrun_trains_every_stage(stripes: Path, tmp_path: Path) -> None:
    common = ["--data", stripes, "--epochs", 1, "--batch", 32, "--threads", 1]
    base, policy, model = (tmp_path / f"{name}.safetensors" for name in ("base", "policy", "model"))
    bdtool = ["-m", "bdtool", "train"]
    run(*bdtool, "pretrain", "--arch", "resnet8", *common, "-o", base, processes=2)
    run(*bdtool, "curriculum", base, *common, "-o", policy, processes=2)
    run(*bdtool, "finetune", policy, *common, "--val", stripes, "-o", model, processes=2)
    run(*bdtool, "finetune", model, "--freeze-policy", *common, "-o", tmp_path / "frozen.safetensors", processes=2)
    trained = load_model(model)
    assert trained.spec.provenance["created_by"] == "bdtool train finetune"
    assert trained.spec.provenance["start"]["created_by"] == "bdtool train curriculum"
    assert trained.spec.provenance["figures"]["n_images"] == 256


@pytest.mark.slow
def test_torchrun_ends_where_another_run_is_at_work(stripes: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    words = ["pretrain", "--arch", "resnet8", "--data", stripes, "--batch", 32, "--threads", 1, "-o", model]
    with (
        exclusive_lock(tmp_path / ".model.safetensors.lock", purpose="the other run"),
        pytest.raises(subprocess.CalledProcessError) as refused,
    ):
        run("-m", "bdtool", "train", *words, processes=2)
    assert f"training into {model} is already running in another process" in refused.value.stderr
    assert not model.exists()

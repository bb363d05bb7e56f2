from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bdtool.models.model import BlockDropModel
from bdtool.training.passes import frozen_copy, paired_logits

_N = 12


def random_keep(n_blocks: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(_N, n_blocks, generator=torch.Generator().manual_seed(seed)) < share


@pytest.fixture(scope="module", params=["option-a", "average-pool"])
def model(request: pytest.FixtureRequest, random_model: Callable[..., BlockDropModel]) -> BlockDropModel:
    return random_model("resnet14", shortcut=request.param)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), first=st.floats(0, 1), second=st.floats(0, 1), n_forced=st.integers(0, 6))
def test_paired_pass_equals_two_passes(
    model: BlockDropModel, seed: int, first: float, second: float, n_forced: int
) -> None:
    images = torch.randn(_N, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    greedy, sampled = random_keep(6, first, seed), random_keep(6, second, seed + 1)
    greedy[:, :n_forced] = sampled[:, :n_forced] = True
    sampled[0] = greedy[0]  # equal rows never fork
    frozen = frozen_copy(model.base, dtype=torch.float32)
    got = paired_logits(frozen, images.to(memory_format=torch.channels_last), greedy, sampled)
    with torch.no_grad():
        torch.testing.assert_close(got[0], model(images, greedy), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got[1], model(images, sampled), atol=1e-4, rtol=1e-4)


def test_equal_matrices_cost_one_pass(model: BlockDropModel, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = frozen_copy(model.base, dtype=torch.float32)
    rows: list[int] = []
    frozen.head.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))
    keep = random_keep(6, 0.5, 0)
    paired_logits(frozen, torch.randn(_N, 3, 32, 32), keep, keep)
    assert rows == [_N]


class Waits(TorchDispatchMode):
    """Notes the operations in which the host waits for a GPU, where its tensors are on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default):
            self.found.append(func)
        return func(*arguments, **(options or {}))


def test_paired_pass_waits_for_no_block_alone(model: BlockDropModel) -> None:
    frozen = frozen_copy(model.base, dtype=torch.float32)
    with Waits() as waits:
        paired_logits(frozen, torch.randn(_N, 3, 32, 32), random_keep(6, 0.5, 0), random_keep(6, 0.5, 1))
    assert waits.found == []


@pytest.mark.parametrize("arch", ["resnet14", "resnet18", "resnet50"])
def test_frozen_copy_computes_what_the_base_does(arch: str, random_model: Callable[..., BlockDropModel]) -> None:
    model = random_model(arch, size=32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.base(images)
        got = frozen_copy(model.base, dtype=torch.float32)(images)
    torch.testing.assert_close(got, expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)


def test_frozen_copy_leaves_the_base_as_it_is(random_model: Callable[..., BlockDropModel]) -> None:
    model = random_model("resnet8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen_copy(model.base, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.base.parameters())

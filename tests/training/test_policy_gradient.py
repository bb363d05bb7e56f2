import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtool.models.model import BlockDropModel
from bdtool.training.policy_gradient import bound_probability, entropy, learned_blocks, policy_loss, reward


def every_policy(n_blocks: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=n_blocks)))


def test_bounded_probabilities_lie_between_1_minus_alpha_and_alpha() -> None:
    s = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(bound_probability(s, 0.8), torch.tensor([0.2, 0.5, 0.8]))


def test_reward_is_that_of_equation_3() -> None:
    keep = torch.tensor([[True, False, False, False], [True, True, True, True], [False] * 4])
    correct = torch.tensor([True, True, False])
    torch.testing.assert_close(reward(keep, correct, gamma=5.0), torch.tensor([1 - 1 / 16, 0.0, -5.0]))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), n_learned=st.integers(1, 4))
def test_mean_gradient_over_all_policies_is_that_of_the_expected_reward(seed: int, n_learned: int) -> None:
    """The sum over all 2^K policies of P(u) times the gradient for u is the gradient of sum P(u) R(u)."""
    n_blocks = 4
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, n_blocks, generator=generator, dtype=torch.float64, requires_grad=True)
    learned = learned_blocks(n_blocks, n_learned)
    policies = every_policy(n_blocks)
    policies = policies[policies[:, ~learned].all(dim=1)]  # blocks that are not learned are kept on
    rewards = torch.randn(len(policies), generator=generator, dtype=torch.float64)
    bounded = bound_probability(torch.sigmoid(logits), 0.8)
    factors = torch.where(policies, bounded, 1 - bounded)
    likelihood = torch.where(learned, factors, torch.ones_like(factors)).prod(dim=1)
    [expected] = torch.autograd.grad(-(likelihood * rewards).sum(), logits, retain_graph=True)

    baseline = 0.7  # any baseline that does not depend on u leaves the expectation as it is
    total = torch.zeros_like(logits)
    for policy, probability, value in zip(policies, likelihood.detach(), rewards, strict=True):
        loss = policy_loss(bounded, policy[None], (value - baseline)[None], learned)
        [gradient] = torch.autograd.grad(loss, logits, retain_graph=True)
        total += probability * gradient
    torch.testing.assert_close(total, expected)
    assert torch.all(total[0, ~learned] == 0)


def test_mean_gradient_of_a_policy_network_is_that_of_the_expected_reward(
    random_model: Callable[..., BlockDropModel],
) -> None:
    """The same through a real policy network and base: the reward of each of the 8 policies of a ResNet-8."""
    model: BlockDropModel = random_model("resnet8")
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = model(images).argmax(dim=1)  # right where all blocks are kept, often wrong elsewhere
    assert model.policy is not None
    weight = model.policy.logit.weight
    learned = learned_blocks(3, 3)
    bounded = bound_probability(model.policy(images), 0.8)
    policies = every_policy(3)
    with torch.no_grad():
        keeps = [policy.expand(6, 3) for policy in policies]
        rewards = torch.stack([reward(keep, model(images, keep).argmax(dim=1) == labels, 2.0) for keep in keeps])
    assert len(rewards.unique()) > 3, "the policies must matter, else nothing is tested"
    likelihood = torch.stack([torch.where(keep, bounded, 1 - bounded).prod(dim=1) for keep in keeps])
    [expected] = torch.autograd.grad(-(likelihood * rewards).sum(dim=0).mean(), weight, retain_graph=True)
    total = torch.zeros_like(weight)
    for keep, probability, value in zip(keeps, likelihood.detach(), rewards, strict=True):
        loss = policy_loss(bounded, keep, probability * (value - rewards[-1]), learned)
        total += torch.autograd.grad(loss, weight, retain_graph=True)[0]
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=1e-4)


def test_a_block_that_is_nearly_always_kept_can_still_be_unlearned_in_bfloat16(
    random_model: Callable[..., BlockDropModel],
) -> None:
    policy = random_model("resnet8").policy
    assert policy is not None
    with torch.no_grad():
        policy.logit.weight.zero_()
        policy.logit.bias.fill_(8.0)
    with torch.autocast("cpu", torch.bfloat16):
        probability = policy(torch.zeros(1, 3, 32, 32))
    expected = torch.tensor(8.0, requires_grad=True)
    torch.testing.assert_close(probability, torch.sigmoid(expected).detach().expand(1, 3))
    [gradient] = torch.autograd.grad(probability.sum(), policy.logit.bias)
    torch.sigmoid(expected).backward()
    torch.testing.assert_close(gradient, expected.grad.expand(3), rtol=0.01, atol=0)  # bfloat16 has 8 bits


def test_entropy_counts_the_learned_blocks_alone() -> None:
    bounded = torch.full((3, 4), 0.5)
    assert entropy(bounded, learned_blocks(4, 2)).item() == pytest.approx(2 * math.log(2))


def test_the_curriculum_learns_the_last_blocks_first() -> None:
    assert learned_blocks(5, 2).tolist() == [False, False, False, True, True]

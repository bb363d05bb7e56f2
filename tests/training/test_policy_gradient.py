import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtool.models.model import BlockDropModel
from bdtool.training.options import CurriculumOptions, FinetuneOptions
from bdtool.training.policy_gradient import bound_probability, entropy, learned_blocks, policy_loss, reward
from bdtool.training.tasks import CurriculumTask, FinetuneTask, Outcome, Step

_GENERATOR = torch.Generator().manual_seed(1)
_IMAGES, _UNIFORMS = torch.randn(16, 3, 32, 32, generator=_GENERATOR), torch.rand(16, 3, generator=_GENERATOR)


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


def expected_step(
    s: torch.Tensor,
    learned: torch.Tensor,
    sampled_correct: Callable[[torch.Tensor], torch.Tensor],
    greedy_correct: Callable[[torch.Tensor], torch.Tensor],
) -> Outcome:
    """Equations 3 to 7 with gamma 2, alpha 0.8 and an entropy bonus of weight 0.1; the last two say what is right."""
    bounded = 0.8 * s + 0.2 * (1 - s)
    sampled, greedy = (bounded > _UNIFORMS) | ~learned, (s >= 0.5) | ~learned

    def rewarded(keep: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
        return torch.where(correct, 1 - (keep.sum(dim=1) / 3) ** 2, -2.0)

    correct = sampled_correct(sampled)
    won = rewarded(sampled, correct)
    advantage = won - rewarded(greedy, greedy_correct(greedy))
    assert (advantage != 0).sum() >= 3, "the two must differ, else nothing is tested"
    likelihood = torch.where(sampled, bounded, 1 - bounded)[:, learned].log().sum(dim=1)
    surprise = -(bounded * bounded.log() + (1 - bounded) * (1 - bounded).log())[:, learned].sum(dim=1)
    loss = -(advantage * likelihood).mean() - 0.1 * surprise.mean()
    return Outcome(loss, correct.float(), sampled.float().sum(dim=1), won)


@pytest.fixture
@torch.no_grad()
def lively(random_model: Callable[..., BlockDropModel]) -> BlockDropModel:
    """A model whose answers depend on the image and on the path, and its keep bits on the image, as if it had learned.

    `random_model` is balanced in eval mode; a step of training normalises by the batch.
    """
    model: BlockDropModel = random_model("resnet8")
    assert model.policy is not None
    answers = torch.cat([model(_IMAGES, keep.expand(16, 3)) for keep in every_policy(3)])
    decisions = model.policy.logit(model.policy.train().features(_IMAGES))
    for layer, logits in ((model.base.head.linear, answers), (model.policy.logit, decisions)):
        layer.weight.div_(logits.std(dim=0)[:, None])
        layer.bias.sub_(logits.mean(dim=0)).div_(logits.std(dim=0))
    return model


@torch.no_grad()
@pytest.mark.parametrize("n_learned", [1, 2, 3])
def test_a_step_of_the_curriculum_is_that_of_the_equations(n_learned: int, lively: BlockDropModel) -> None:
    reference, labels = copy.deepcopy(lively), lively(_IMAGES).argmax(dim=1)
    task = CurriculumTask(lively, CurriculumOptions(gamma=2.0, entropy=0.1, stage_epochs=1), amp=False)
    assert task.begin_step(Step(n_learned - 1, 1, torch.arange(16))) == f"last {n_learned} of 3 blocks"
    assert reference.policy is not None

    def correct(keep: torch.Tensor) -> torch.Tensor:
        return reference(_IMAGES, keep).argmax(dim=1) == labels

    learned = torch.arange(3) >= 3 - n_learned
    expected = expected_step(reference.policy.train()(_IMAGES), learned, correct, correct)
    torch.testing.assert_close(tuple(task.module(_IMAGES, labels, _UNIFORMS)), tuple(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_step_of_joint_finetuning_is_that_of_the_equations(lively: BlockDropModel) -> None:
    """The base learns along the sampled paths; the greedy ones are judged by it as it would be deployed."""
    reference, labels = copy.deepcopy(lively), lively(_IMAGES).argmax(dim=1)
    task = FinetuneTask(lively, FinetuneOptions(gamma=2.0, entropy=0.1), amp=False)
    task.begin_step(Step(0, 1, torch.arange(16)))
    assert reference.policy is not None
    taken: list[torch.Tensor] = []

    def sampled_correct(keep: torch.Tensor) -> torch.Tensor:
        taken.append(reference.base.train()(_IMAGES, keep))
        return taken[0].argmax(dim=1) == labels

    def greedy_correct(keep: torch.Tensor) -> torch.Tensor:
        return reference.base.eval()(_IMAGES, keep).argmax(dim=1) == labels

    s, every = reference.policy.train()(_IMAGES), torch.ones(3, dtype=torch.bool)
    expected = expected_step(s, every, sampled_correct, greedy_correct)
    expected = expected._replace(loss=expected.loss + F.cross_entropy(taken[0], labels))
    torch.testing.assert_close(tuple(task.module(_IMAGES, labels, _UNIFORMS)), tuple(expected), atol=1e-4, rtol=1e-4)
    assert lively.base.training
    assert lively.base.stem.bn.num_batches_tracked == 1, "the statistics are of the sampled paths alone"

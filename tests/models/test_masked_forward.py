"""`ResNet.forward` with a keep matrix against the paper's loop, written again here for one image at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bdtool.models.architectures import architecture
from bdtool.models.model import build_model

N_IMAGES = 3
N_BLOCKS = 6  # resnet14: stages of 2, so blocks 2 and 4 change the shape


def _conv_bn(state, x, conv, bn, *, stride=1):
    weight = state[f"{conv}.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    statistics = (state[f"{bn}.running_mean"], state[f"{bn}.running_var"], state[f"{bn}.weight"], state[f"{bn}.bias"])
    return F.batch_norm(x, *statistics)


def _shortcut(x, kind, state, prefix):
    channels = x.shape[1]
    if kind == "projection":
        return _conv_bn(state, x, f"{prefix}.conv", f"{prefix}.bn", stride=2)
    if kind == "option-a":
        side = torch.zeros_like(x[:, : channels // 2, ::2, ::2])
        return torch.cat([side, x[:, :, ::2, ::2], side], dim=1)
    pooled = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    return torch.cat([pooled, torch.zeros_like(pooled)], dim=1)


def _paper_logits(model, image, keep):
    """Logits [classes] of one image [3, 32, 32] for K keep bits."""
    state = dict(model.base.state_dict())
    x = F.relu(_conv_bn(state, image[None], "stem.conv", "stem.bn"))
    for k, kept in enumerate(keep):
        block = f"blocks.{k}"
        changes = k in (2, 4)
        passed = _shortcut(x, model.spec.shortcut, state, f"{block}.shortcut") if changes else x
        if kept:
            y = F.relu(_conv_bn(state, x, f"{block}.conv1", f"{block}.bn1", stride=2 if changes else 1))
            x = F.relu(passed + _conv_bn(state, y, f"{block}.conv2", f"{block}.bn2"))
        else:
            x = passed
    return (x.mean(dim=(2, 3)) @ state["head.linear.weight"].T + state["head.linear.bias"])[0]


@pytest.fixture(scope="module")
def models(make_model):
    return {kind: make_model("resnet14", shortcut=kind) for kind in ("option-a", "average-pool", "projection")}


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["option-a", "average-pool", "projection"]),
    bits=st.lists(st.lists(st.booleans(), min_size=N_BLOCKS, max_size=N_BLOCKS), min_size=N_IMAGES, max_size=N_IMAGES),
)
def test_masked_forward_equals_the_papers_loop_image_by_image(models, kind, bits):
    images = torch.randn(N_IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.stack([_paper_logits(models[kind], *pair) for pair in zip(images, bits, strict=True)])
        logits = models[kind](images, torch.tensor(bits))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)  # float32, other order of additions


def test_no_mask_means_every_block(models):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        everything = models["option-a"](images, torch.ones(2, N_BLOCKS, dtype=torch.bool))
        assert torch.equal(models["option-a"](images), everything)


def test_gradients_reach_only_the_kept_blocks(make_model):
    model = make_model("resnet14")
    keep = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, 1]], dtype=torch.bool)
    model(torch.randn(2, 3, 32, 32), keep).sum().backward()
    reached = [block.conv1.weight.grad is not None for block in model.base.blocks]
    assert reached == keep.any(dim=0).tolist()


@pytest.mark.parametrize("keep", [torch.ones(2, 5, dtype=torch.bool), torch.ones(2, N_BLOCKS)])
def test_keep_matrix_of_wrong_shape_or_type_is_refused(models, keep):
    with pytest.raises(ValueError, match=r"keep must be bool \(2, 6\)"):
        models["option-a"](torch.randn(2, 3, 32, 32), keep)


def test_seeded_weights_repeat_and_leave_the_global_generator_alone(make_model):
    spec = make_model("resnet8").spec
    state_before = torch.get_rng_state()
    first, second = build_model(spec, seed=5), build_model(spec, seed=5)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert torch.equal(first.base.head.linear.weight, second.base.head.linear.weight)
    assert not torch.equal(first.base.head.linear.weight, build_model(spec, seed=6).base.head.linear.weight)


@pytest.mark.parametrize(
    ("arch", "policy_downscale", "seen"),
    [("resnet18", 0, 32), ("resnet18", 1, 64), ("resnet14", 0, 64), ("resnet14", 4, 16)],
)
def test_policy_sees_pictures_scaled_down(make_model, arch, policy_downscale, seen):
    """Of ImageNet's by half unless it is said, as in the paper; what it sees are means of the pixels."""
    model = make_model(arch, n_classes=5, size=64, policy_downscale=policy_downscale)
    images = torch.randn(2, 3, 64, 64)
    pictures = []
    model.policy.trunk.stem.conv.register_forward_pre_hook(lambda _module, inputs: pictures.append(inputs[0]))
    with torch.no_grad():
        probability = model.keep_probability(images)
    factor = 64 // seen
    means = images.reshape(2, 3, seen, factor, seen, factor).mean(dim=(3, 5))
    torch.testing.assert_close(pictures[0], means)
    assert probability.shape == (2, architecture(arch).n_blocks)
    assert probability.min() > 0
    assert probability.max() < 1

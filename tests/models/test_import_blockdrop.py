"""Importing the checkpoints of BlockDrop's authors, against networks written here in their layout."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from bdtool.errors import CheckpointError
from bdtool.models.checkpoints import import_checkpoint


class _Branch(nn.Module):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)

    def forward(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class _AuthorsCifarNet(nn.Module):
    """Names of `FlatResNet32`: conv1, bn1, blocks.<stage>.<i>, fc; its shortcuts have no weights."""

    def __init__(self, stages, n_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        self.blocks = nn.ModuleList(
            nn.ModuleList(_Branch(widths[s + (i > 0)], widths[s + 1], 1 + (i == 0 < s)) for i in range(n))
            for s, n in enumerate(stages)
        )
        self.fc = nn.Linear(64, n_classes) if n_classes else nn.Sequential()

    def forward(self, images, policy=None):
        x = F.relu(self.bn1(self.conv1(images)))
        bits = iter(policy if policy is not None else [1] * 999)
        for s, stage in enumerate(self.blocks):
            for i, branch in enumerate(stage):
                passed = x
                if i == 0 < s:
                    pooled = F.avg_pool2d(x, 2)
                    passed = torch.cat([pooled, pooled * 0], dim=1)
                x = F.relu(passed + branch(x)) if next(bits) else passed
        return self.fc(x.mean(dim=(2, 3)))


class _AuthorsCifarPolicy(nn.Module):
    def __init__(self, n_blocks):
        super().__init__()
        self.features = _AuthorsCifarNet([1, 1, 1], None)
        self.logit, self.vnet = nn.Linear(64, n_blocks), nn.Linear(64, 1)

    def forward(self, images):
        return torch.sigmoid(self.logit(self.features(images)))


@pytest.fixture
def authors_cifar(stir):
    torch.manual_seed(0)
    nets = _AuthorsCifarNet([5, 5, 5], 10).eval(), _AuthorsCifarPolicy(15).eval()
    for net in nets:
        stir(net)
    return nets


def _without_counters(state):
    """State dicts from before PyTorch 0.4.1 have no num_batches_tracked."""
    return {key: value for key, value in state.items() if "num_batches" not in key}


def _saved(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("policy_key", ["agent", "net"])
def test_authors_cifar_checkpoint_gives_their_answers(authors_cifar, tmp_path, legacy, policy_key):
    base, policy = authors_cifar
    agent = {f"module.{key}": value for key, value in _without_counters(policy.state_dict()).items()}
    agent["module.features.fc.weight"], agent["module.features.fc.bias"] = torch.zeros(10, 64), torch.zeros(10)
    content = {policy_key: agent, "resnet": _without_counters(base.state_dict()), "epoch": 7, "acc": 0.9}
    path = _saved(tmp_path / "ckpt.t7", content, _use_new_zipfile_serialization=not legacy)
    model = import_checkpoint(path, arch="resnet32")
    images, bits = torch.randn(1, 3, 32, 32), [1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0]
    with torch.no_grad():
        torch.testing.assert_close(model(images, torch.tensor([bits], dtype=torch.bool)), base(images, bits))
        torch.testing.assert_close(model.keep_probability(images), policy(images))
    assert model.spec.has_policy
    assert model.spec.shortcut == "average-pool"
    assert model.spec.labels[9] == "truck"


def test_networks_of_one_module_may_be_data_parallel_each(authors_cifar, tmp_path):
    networks = dict(zip(("resnet", "agent"), authors_cifar, strict=True))
    state = {f"{name}.module.{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
    model = import_checkpoint(_saved(tmp_path / "net.pth", {"state_dict": state}), arch="resnet32")
    assert torch.equal(model.base.state_dict()["stem.conv.weight"], authors_cifar[0].conv1.weight)
    assert model.spec.has_policy


def _authors_imagenet_state(state):
    """Rename torchvision's keys as the authors' `load_weights_to_flatresnet` does."""

    def rename(key):
        key = re.sub(r"^layer(\d)\.\d+\.downsample", lambda m: f"ds.{int(m[1]) - 1}", key)
        return re.sub(r"^layer(\d)", lambda m: f"blocks.{int(m[1]) - 1}", key)

    return {rename(key): value for key, value in state.items()}


def test_authors_imagenet_checkpoint_gives_torchvisions_answers(stir, tmp_path):
    base = torchvision.models.resnet50().eval()
    policy = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=16).eval()
    stir(base)
    stir(policy)
    agent = {f"features.{key}": value for key, value in _authors_imagenet_state(policy.state_dict()).items()}
    logit = {"logit.weight": agent.pop("features.fc.weight"), "logit.bias": agent.pop("features.fc.bias")}
    value_head = {"vnet.weight": torch.zeros(1, 512), "vnet.bias": torch.zeros(1)}
    content = {"resnet": _authors_imagenet_state(base.state_dict()), "agent": agent | logit | value_head}
    model = import_checkpoint(_saved(tmp_path / "ckpt.t7", content), arch="resnet50", format="blockdrop")
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), base(images), atol=1e-4, rtol=1e-4)
        expected = torch.sigmoid(policy(F.avg_pool2d(images, 2)))
        torch.testing.assert_close(model.keep_probability(images), expected, atol=1e-5, rtol=1e-4)
    assert model.spec.labels[0] == "tench"
    assert model.spec.preprocessing.resize == 256


@pytest.mark.parametrize(
    ("arch", "stages", "n_classes", "mean"),
    [
        ("resnet32", [5, 5, 5], 10, (125.3 / 255, 123.0 / 255, 113.9 / 255)),
        ("resnet32", [5, 5, 5], 100, (0.0, 0.0, 0.0)),
        ("resnet110", [18, 18, 18], 10, (0.0, 0.0, 0.0)),
    ],
)
def test_only_the_authors_r32_for_cifar10_subtracts_a_mean(tmp_path, arch, stages, n_classes, mean):
    path = _saved(tmp_path / "ckpt.t7", {"resnet": _AuthorsCifarNet(stages, n_classes).state_dict()})
    spec = import_checkpoint(path, arch=arch).spec
    assert spec.preprocessing.mean == mean
    assert not spec.has_policy
    assert spec.n_classes == n_classes
    assert (spec.labels is None) == (n_classes == 100)


def test_curriculum_checkpoint_is_refused_with_the_reason(authors_cifar, tmp_path):
    path = _saved(tmp_path / "ckpt.t7", {"agent": authors_cifar[1].state_dict(), "epoch": 3})
    with pytest.raises(CheckpointError, match=r"curriculum learning, which trains the policy alone.*fine-tuned"):
        import_checkpoint(path, arch="resnet32")


def test_wrong_depth_names_the_likely_arch(authors_cifar, tmp_path):
    base, policy = authors_cifar
    path = _saved(tmp_path / "ckpt.t7", {"resnet": base.state_dict(), "agent": policy.state_dict()})
    with pytest.raises(CheckpointError, match=r"missing: resnet\.blocks\.0\.5\..*it looks like --arch resnet32$"):
        import_checkpoint(path, arch="resnet110")


def test_policy_for_another_number_of_blocks_is_named(authors_cifar, tmp_path):
    policy = _AuthorsCifarPolicy(54).state_dict()
    path = _saved(tmp_path / "ckpt.t7", {"resnet": authors_cifar[0].state_dict(), "agent": policy})
    with pytest.raises(CheckpointError, match=r"agent\.logit\.weight got \[54, 64\], needs \[15, 64\]"):
        import_checkpoint(path, arch="resnet32")

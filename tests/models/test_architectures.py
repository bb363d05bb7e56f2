import pytest

from bdtool.errors import UsageError
from bdtool.models.architectures import architecture, known_architectures


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet32", (5, 5, 5)),
        ("resnet110", (18, 18, 18)),
        ("resnet101", (3, 4, 23, 3)),
        ("resnet1202", (200,) * 3),
        ("resnet8", (1, 1, 1)),
    ],
)
def test_stages_are_those_of_the_papers(name, stages):
    assert architecture(name).stages == stages


def test_resnet50_is_the_imagenet_network_though_50_is_6n_plus_2():
    assert architecture("resnet50").family == "imagenet"
    assert architecture("resnet50").block == "bottleneck"


@pytest.mark.parametrize("name", ["resnet33", "resnet2", "resnet", "vgg16", "resnet020", "resnet-32", ""])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UsageError, match="resnet110, resnet10, resnet18"):
        architecture(name)


def test_every_known_architecture_exists():
    assert [architecture(name).name for name in known_architectures()] == list(known_architectures())

"""FP32 stays exact where a program lets PyTorch round, for models of its own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdtool.torch_classifier import TorchClassifier
from engines.torch_precision import convolutions, convolve_exactly, matrix_products
from engines.torchrt import TorchBackend

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def precision_put_back():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.conv.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("precision", ["none", "tf32"])
def test_convolutions_are_exact_whatever_the_program_says_of_the_rest(device, precision):
    torch.backends.fp32_precision = precision
    convolve_exactly(device)
    assert convolutions(device).fp32_precision == "ieee"
    if device is GPU:
        assert torch.backends.cudnn.allow_tf32 is False  # PyTorch raises where its flags do not agree


@pytest.mark.parametrize("asked", ["high", "medium"])
def test_last_layers_are_exact_where_others_may_be_rounded(tiny_bundle, monkeypatch, asked):
    """As Lightning advises."""
    part, found = tiny_bundle.network.require("head"), []
    products = matrix_products(CPU)
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *given: found.append(products.fp32_precision) or linear(*given))
    torch.set_float32_matmul_precision(asked)
    allowed = products.fp32_precision
    engine = TorchBackend().load(part, tiny_bundle.part_path(part).read_bytes(), layout="NCHW")
    engine.run({part.inputs[0].name: np.zeros(part.inputs[0].shape_for(1), np.float32)})
    assert found == ["ieee"]
    assert products.fp32_precision == allowed != "ieee", "the program's own models go on as before"
    assert torch.get_float32_matmul_precision() == asked


def test_pytorchs_answers_are_exact_where_others_may_be_rounded(tiny, pixels):
    works = convolutions(CPU), matrix_products(CPU)
    torch.set_float32_matmul_precision("high")
    torch.backends.mkldnn.conv.fp32_precision = "tf32"
    classifier, found = TorchClassifier(tiny.model), []
    hooks = [
        part.register_forward_hook(lambda *_: found.append([work.fp32_precision for work in works]))
        for part in (tiny.model.base, tiny.model.policy)
    ]
    classifier.run(pixels(tiny.model, 2))
    classifier.decide(pixels(tiny.model, 2))
    for hook in hooks:
        hook.remove()
    assert found == [["ieee", "ieee"]] * 3
    assert [work.fp32_precision for work in works] == ["tf32", "tf32"], "training goes on as before"

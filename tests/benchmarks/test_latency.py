"""`benchmarks/latency.py`: its network with random weights is one that runs in every precision."""

import torch

from bdtool.models.parts import network_spec
from bdtool.models.resnet import ResidualBlock
from benchmarks.latency import random_model

HALF_MAX = 65504


def test_random_network_fits_half_precision(preprocessed):
    model, peaks = random_model(), []
    for layer in model.modules():
        if isinstance(layer, ResidualBlock):
            layer.register_forward_hook(lambda layer, inputs, result: peaks.append(float(result.abs().max())))
    images = torch.from_numpy(preprocessed(model, 4))
    with torch.inference_mode():
        logits = model(images)
        assert model.keep_probability(images).std() > 0.01
    assert len(peaks) == model.n_blocks + 3  # the policy network's are among them
    assert max(peaks) < HALF_MAX / 1000  # sums on the way have room, too
    assert logits.std(dim=0).max() > 0.01  # and images still differ


def test_its_policy_network_may_look_at_smaller_images():
    whole, halved = (network_spec(random_model(policy_downscale=factor)).require("policy").flops for factor in (1, 2))
    assert 0.24 < halved / whole < 0.26

"""The chain of real engines gives the logits of PyTorch's masked forward, for any keep matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bdtool.data.synthetic import synthetic_images
from bdtool.models.checkpoints import import_checkpoint
from bdtool.models.store import save_model
from bdtool.pipeline import export_model
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.preprocess import preprocess

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # the bound: float32, other kernels and another summing order
BITS = ["learned", "all", "none", "first:3", "random:4:1", "distribute:2"]


def _pixels(model, n, seed=0):
    size = model.spec.preprocessing
    return synthetic_images(n, height=size.height, width=size.width, seed=seed)


@pytest.fixture(scope="module", params=["average-pool", "option-a"])
def opened(request, export_random):
    """A chain of six blocks with its model; by both parameter-free shortcuts."""
    exported = export_random("resnet14", shortcut=request.param)
    with Orchestrator.open(exported.bundle) as runtime:
        yield exported.model, runtime


def _check(model, runtime, torch_logits, images, keep):
    result = runtime.run(images, policy=keep)
    np.testing.assert_allclose(result.logits, torch_logits(model, images, keep), **TOLERANCE)
    np.testing.assert_array_equal(result.policy, keep)


@settings(max_examples=25)
@given(bits=hnp.arrays(bool, (1, 6)), seed=st.integers(0, 9))
def test_one_image_with_any_bits_equals_pytorch(opened, torch_logits, bits, seed):
    model, runtime = opened
    images = preprocess(_pixels(model, 1, seed), model.spec.preprocessing)
    _check(model, runtime, torch_logits, images, bits)


@settings(max_examples=8)
@given(bits=hnp.arrays(bool, (64, 6)))
def test_64_images_each_with_its_own_bits_equal_pytorch(opened, torch_logits, preprocessed, bits):
    model, runtime = opened
    _check(model, runtime, torch_logits, preprocessed(model, 64), bits)


@pytest.mark.parametrize("n_images", [1, 64])
@pytest.mark.parametrize("bits", ["000000", "110011", "001100", "111111"])
def test_dropped_stage_changes_equal_pytorch(opened, torch_logits, preprocessed, bits, n_images):
    model, runtime = opened
    keep = np.array([[bit == "1" for bit in bits]] * n_images)
    _check(model, runtime, torch_logits, preprocessed(model, n_images), keep)


def test_answer_of_an_image_does_not_depend_on_its_batch(opened, preprocessed):
    model, runtime = opened
    images = preprocessed(model, 70)  # 64 and 6: the bundle's max_batch is 64
    together = runtime.run(images)
    alone = [runtime.run(image[None]) for image in images]
    np.testing.assert_allclose(together.logits, np.concatenate([one.logits for one in alone]), **TOLERANCE)
    np.testing.assert_array_equal(together.policy, np.concatenate([one.policy for one in alone]))


def test_learned_bits_equal_pytorchs(opened, preprocessed, torch_logits):
    model, runtime = opened
    images = preprocessed(model, 64)
    with torch.inference_mode():
        expected = model.keep_probability(torch.from_numpy(images)).numpy() >= 0.5
    result = runtime.run(images)
    np.testing.assert_array_equal(result.policy, expected)
    assert 0.2 < expected.mean() < 0.8
    assert len(np.unique(expected, axis=0)) > 3  # the images really differ in what they keep
    np.testing.assert_allclose(result.logits, torch_logits(model, images, expected), **TOLERANCE)


@pytest.mark.parametrize("policy", BITS)
def test_pixels_and_preprocessed_images_give_the_same(opened, policy):
    model, runtime = opened
    pixels = _pixels(model, 5)
    from_pixels = runtime.run(pixels, policy=policy)
    from_floats = runtime.run(preprocess(pixels, model.spec.preprocessing), policy=policy)
    np.testing.assert_array_equal(from_pixels.logits, from_floats.logits)
    np.testing.assert_array_equal(from_pixels.policy, from_floats.policy)


def test_full_baseline_equals_the_chain_with_all_blocks(tiny, preprocessed, torch_logits):
    images = preprocessed(tiny.model, 5)
    with Orchestrator.open(tiny.bundle, strategy="full") as full, Orchestrator.open(tiny.bundle) as chain:
        logits = full.run(images).logits
        np.testing.assert_allclose(logits, chain.run(images, policy="all").logits, **TOLERANCE)
        np.testing.assert_allclose(logits, torch_logits(tiny.model, images), **TOLERANCE)


def test_runs_leave_the_callers_images_alone(opened, preprocessed):
    model, runtime = opened
    images = preprocessed(model, 3)
    before = images.copy()
    runtime.run(images)
    np.testing.assert_array_equal(images, before)


@pytest.fixture(scope="module")
def resnet32(checkpoints_dir, shared_traces, tmp_path_factory):
    """The public ResNet-32 of akamaster with option-A shortcuts: K = 15, no policy network."""
    directory = tmp_path_factory.mktemp("resnet32")
    model = import_checkpoint(checkpoints_dir / "resnet32-d509ac18.th", arch="resnet32")
    save_model(model, directory / "model.safetensors")
    export_model(directory / "model.safetensors", directory / "bundle")
    with Orchestrator.open(directory / "bundle") as runtime:
        yield model, runtime


@settings(max_examples=8)
@given(bits=hnp.arrays(bool, (16, 15)))
def test_trained_resnet32_with_any_bits_equals_pytorch(resnet32, torch_logits, preprocessed, bits):
    model, runtime = resnet32
    _check(model, runtime, torch_logits, preprocessed(model, 16), bits)
    _check(model, runtime, torch_logits, preprocessed(model, 1), bits[:1])


def test_trained_resnet32_gives_the_same_classes_on_real_images(resnet32, torch_logits, cifar10_test):
    model, runtime = resnet32
    pixels, labels = cifar10_test.images[:200], cifar10_test.labels[:200]
    result = runtime.run(pixels)
    expected = torch_logits(model, preprocess(pixels, model.spec.preprocessing))
    np.testing.assert_allclose(result.logits, expected, **TOLERANCE)
    np.testing.assert_array_equal(result.classes, expected.argmax(axis=1))
    assert (result.classes == labels).mean() > 0.87  # 92.63 % on all 10,000; 200 images scatter by 2 % (1 sigma)


def _check_random_masks(exported, torch_logits, preprocessed, n_masks):
    rng = np.random.default_rng(0)
    images = preprocessed(exported.model, 2)
    with Orchestrator.open(exported.bundle) as runtime:
        n_blocks = runtime.network.n_blocks
        masks = [np.zeros((2, n_blocks), bool), np.ones((2, n_blocks), bool)]
        for keep in [*masks, *(rng.random((n_masks, 2, n_blocks)) < 0.5)]:
            _check(exported.model, runtime, torch_logits, images, keep)
        with torch.inference_mode():
            expected = exported.model.keep_probability(torch.from_numpy(images)).numpy() >= 0.5
        np.testing.assert_array_equal(runtime.run(images).policy, expected)


@pytest.mark.slow
def test_imagenet_resnet18_with_projections_equals_pytorch(export_random, torch_logits, preprocessed):
    _check_random_masks(export_random("resnet18"), torch_logits, preprocessed, n_masks=4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50", "resnext50_32x4d"])
def test_imagenet_network_with_bottlenecks_equals_pytorch(export_random, torch_logits, preprocessed, arch):
    """At 96 x 96: the widths and structures are those of 224 x 224, the time a fifth."""
    _check_random_masks(export_random(arch, size=96), torch_logits, preprocessed, n_masks=4)

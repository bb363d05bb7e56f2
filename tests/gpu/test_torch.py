"""The torch backend on a device against eager PyTorch on the CPU.

The same checks run on the CPU, on fewer masks, so that on a GPU only the device is new.
"""

import numpy as np
import pytest
import torch

from bdtool import Orchestrator
from bdtool.doctor.gpu import driver_detail
from engines.libcuda import driver_from_libcuda
from engines.registry import open_backend

_HAS_GPU = torch.cuda.is_available()
_needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not _HAS_GPU, reason="needs an NVIDIA GPU that PyTorch can use")]
DEVICES = [pytest.param("cpu", 20, id="cpu"), pytest.param("cuda:0", 1000, id="cuda", marks=_needs_gpu)]
TOLERANCES = {"cpu": 1e-4, "cuda:0": 1e-3}  # float32 in another summing order; the weights are random


@pytest.mark.gpu
def test_gpu_of_this_machine_is_used():
    """All other tests of GPUs skip where no backend opens, as on a machine without one."""
    driver = driver_from_libcuda()
    if not driver.gpus:
        pytest.skip(f"no NVIDIA GPU: {driver_detail(driver)}")
    open_backend("torch", "cuda:0")


@pytest.mark.parametrize(("device", "n_masks"), DEVICES)
def test_logits_equal_eager_pytorch_for_random_masks(tiny, preprocessed, torch_logits, device, n_masks):
    images = np.resize(preprocessed(tiny.model, 8), (n_masks, 3, 32, 32))
    keep = np.random.default_rng(0).integers(0, 2, (n_masks, 3)).astype(bool)
    with Orchestrator.open(tiny.bundle, backend="torch", device=device) as runtime:
        logits = runtime.run(images, policy=keep).logits
    tolerance = TOLERANCES[device]
    np.testing.assert_allclose(logits, torch_logits(tiny.model, images, keep), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("device", "n_masks"), DEVICES)
def test_learned_policy_equals_eager_pytorch(tiny, preprocessed, torch_logits, device, n_masks):
    images = preprocessed(tiny.model, 16)
    with Orchestrator.open(tiny.bundle, backend="torch", device=device) as runtime:
        result = runtime.run(images)
    with torch.inference_mode():
        probability = tiny.model.keep_probability(torch.from_numpy(images)).numpy()
    clear = np.abs(probability - 0.5) > TOLERANCES[device]  # another rounding may flip what lies on the threshold
    np.testing.assert_array_equal(result.policy[clear], (probability >= 0.5)[clear])
    expected = torch_logits(tiny.model, images, result.policy)
    np.testing.assert_allclose(result.logits, expected, atol=TOLERANCES[device], rtol=TOLERANCES[device])
    assert clear.mean() > 0.9


@pytest.mark.parametrize(("device", "n_masks"), DEVICES)
def test_single_images_and_batches_agree(tiny, preprocessed, device, n_masks):
    images = preprocessed(tiny.model, 5)
    keep = np.array([[1, 0, 1]] * 2 + [[0, 1, 0]] * 3, dtype=bool)
    with Orchestrator.open(tiny.bundle, backend="torch", device=device) as runtime:
        together = runtime.run(images, policy=keep).logits
        alone = np.concatenate([runtime.run(images[i : i + 1], policy=keep[i]).logits for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=TOLERANCES[device], rtol=TOLERANCES[device])

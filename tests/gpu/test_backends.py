"""Every backend and strategy of a GPU against eager PyTorch on the CPU, and what they leave behind."""

import gc
import itertools

import numpy as np
import pytest
import torch

from bdtool import Orchestrator
from bdtool.errors import BdtoolError
from bdtool.runtime.factory import require_strategy
from bdtool.runtime.path_cache import PathOptions
from bdtool.words import counted
from engines.dispatch import runs
from engines.network_graphs import NetworkGraphs
from engines.registry import captures, identify_backend, plan_graphs
from engines.speculation import Speculation
from tests.fake_tensorrt import FakeTensorRT


def _open(place, bundle, strategy, **options):
    try:
        require_strategy(strategy, place.backend, place.device)
    except BdtoolError as error:
        pytest.skip(str(error))
    return Orchestrator.open(bundle, backend=place.backend, device=place.device, strategy=strategy, **options)


def _open_graph(place, bundle, mode, **options):
    """Open strategy `graph` in a mode; only where driver or packages lack that mode is there nothing to test."""
    try:
        plan_graphs(place.backend, place.device, mode)
    except BdtoolError as error:
        pytest.skip(str(error))
    return _open(place, bundle, "graph", cuda_graph=mode, **options)


def _need_own_memory(place):
    if not captures(place.backend, place.device):
        pytest.skip(f"{place.backend} has neither CUDA graphs nor device memory that others read")


@pytest.mark.parametrize("form", ["pixels", "preprocessed"])
@pytest.mark.parametrize("strategy", ["chain", "path", "fused", "graph"])
def test_logits_equal_eager_pytorch_for_random_masks(
    place, tiny, bundle_copy, request, preprocessed, torch_logits, strategy, form
):
    rows = np.arange(place.n_masks) % 8
    images = request.getfixturevalue(form)(tiny.model, 8)[rows]
    keep = np.random.default_rng(0).integers(0, 2, (place.n_masks, 3)).astype(bool)
    with _open(place, bundle_copy, strategy) as runtime:
        together = runtime.run(images, policy=keep).logits
        alone = np.concatenate([runtime.run(images[i : i + 1], policy=keep[i]).logits for i in range(8)])
    expected = torch_logits(tiny.model, preprocessed(tiny.model, 8)[rows], keep)
    np.testing.assert_allclose(together, expected, atol=place.tolerance, rtol=place.tolerance)
    np.testing.assert_allclose(alone, expected[:8], atol=place.tolerance, rtol=place.tolerance)


@pytest.mark.parametrize("strategy", ["chain", "graph"])
def test_learned_policy_decides_as_eager_pytorch(
    place, tiny, bundle_copy, pixels, preprocessed, torch_logits, strategy
):
    with _open(place, bundle_copy, strategy) as runtime:
        result = runtime.run(pixels(tiny.model, 16))
    _check_learned(result, tiny.model, preprocessed(tiny.model, 16), torch_logits, place.tolerance)


def _check_learned(result, model, images, torch_logits, tolerance):
    """Compare keep bits and logits with eager PyTorch's, for images whose bits the policy network decided."""
    with torch.inference_mode():
        probability = model.keep_probability(torch.from_numpy(images)).numpy()
    clear = np.abs(probability - 0.5) > tolerance  # another rounding may flip what lies on the threshold
    np.testing.assert_array_equal(result.policy[clear], (probability >= 0.5)[clear])
    assert clear.mean() > 0.9
    expected = torch_logits(model, images, result.policy)
    np.testing.assert_allclose(result.logits, expected, atol=tolerance, rtol=tolerance)


def test_full_and_half_precision_come_close(place, tiny, bundle_copy, pixels, preprocessed, torch_logits):
    images, ready = pixels(tiny.model, 4), preprocessed(tiny.model, 4)
    with _open(place, bundle_copy, "full") as runtime:
        expected = torch_logits(tiny.model, ready)
        np.testing.assert_allclose(runtime.run(images).logits, expected, atol=place.tolerance, rtol=place.tolerance)
    if not identify_backend(place.backend, place.device).converts_fp16:
        return
    keep = np.array([[1, 0, 1]] * 4, dtype=bool)
    with _open(place, bundle_copy, "chain", precision="fp16") as runtime:
        logits = runtime.run(images, policy=keep).logits
    np.testing.assert_allclose(logits, torch_logits(tiny.model, ready, keep), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("mode", ["policy-cache", "switch", "path-cache", "off"])
def test_every_graph_mode_equals_eager_pytorch(place, tiny, bundle_copy, preprocessed, torch_logits, mode):
    keep = np.array(list(itertools.product((False, True), repeat=3)))
    images = preprocessed(tiny.model, len(keep))
    with _open_graph(place, bundle_copy, mode, paths=PathOptions(ahead=[keep[5], keep[2]])) as runtime:
        logits = runtime.run(images, policy=keep).logits
        again = runtime.run(images[::-1].copy(), policy=keep[::-1]).logits
        learned = runtime.run(images)
    expected = torch_logits(tiny.model, images, keep)
    np.testing.assert_allclose(logits, expected, atol=place.tolerance, rtol=place.tolerance)
    np.testing.assert_allclose(again, expected[::-1], atol=place.tolerance, rtol=place.tolerance)
    _check_learned(learned, tiny.model, images, torch_logits, place.tolerance)


@pytest.mark.parametrize("n_begun", [1, 2])
def test_blocks_beside_the_policy_network_change_nothing(
    place, tiny, bundle_copy, preprocessed, torch_logits, monkeypatch, n_begun
):
    keep = np.array(list(itertools.product((False, True), repeat=3)))
    images = preprocessed(tiny.model, len(keep))
    found, _ = runs(keep[5].tolist(), [False, True, True])
    monkeypatch.setattr(NetworkGraphs, "speculation", lambda *_: Speculation(tuple(found[:n_begun]), 0.5))
    with _open_graph(place, bundle_copy, "policy-cache", paths=PathOptions(ahead=[keep[5], keep[2]])) as runtime:
        for order in (1, -1):  # right after wrong, and wrong after right
            logits = runtime.run(images[::order].copy(), policy=keep[::order]).logits
            expected = torch_logits(tiny.model, images, keep)[::order]
            np.testing.assert_allclose(logits, expected, atol=place.tolerance, rtol=place.tolerance)
        # given bits would hide what the blocks do to the policy network, whose tensors lie beside theirs
        learned = runtime.run(images)
        _check_learned(learned, tiny.model, images, torch_logits, place.tolerance)
        assert len(np.unique(learned.policy, axis=0)) > 1
        assert f"the {counted(n_begun, 'part')} that" in runtime.graph_choice.reason


def test_replayed_baseline_equals_plain_launches(place, tiny, bundle_copy, preprocessed):
    _need_own_memory(place)
    images = preprocessed(tiny.model, 4)
    with _open(place, bundle_copy, "full") as replayed, _open(place, bundle_copy, "full", cuda_graph="off") as plain:
        logits, expected = replayed.run(images).logits, plain.run(images).logits
        assert (replayed.graph_choice.mode, plain.graph_choice.mode) == ("replay", "off")
    np.testing.assert_allclose(logits, expected, atol=place.tolerance, rtol=place.tolerance)
    assert np.ptp(expected) > 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("strategy", ["chain", "graph", "full"])
def test_images_on_the_gpu_give_logits_there(place, tiny, bundle_copy, preprocessed, strategy):
    if "driver" in FakeTensorRT.notes:
        pytest.skip("the stand-in cannot read PyTorch's memory")
    _need_own_memory(place)
    images = preprocessed(tiny.model, 3)
    with _open(place, bundle_copy, strategy) as runtime:
        expected = runtime.run(images).logits
        logits = runtime.run(torch.from_numpy(images).to("cuda:0")).logits
    for taken in (torch.as_tensor(logits, device="cuda:0"), torch.from_dlpack(logits)):
        assert taken.data_ptr() == logits.address
        np.testing.assert_allclose(taken.cpu().numpy(), expected, atol=place.tolerance, rtol=place.tolerance)


def test_graph_refuses_a_policy_that_is_not_finite(place, bundle_copy):
    with _open(place, bundle_copy, "graph") as runtime, pytest.raises(BdtoolError, match="not finite"):
        runtime.run(np.full((1, 3, 32, 32), np.nan, np.float32))


@pytest.mark.parametrize("strategy", ["chain", "graph"])
def test_running_takes_no_more_memory(place, tiny, bundle_copy, pixels, strategy):
    image = pixels(tiny.model, 1)
    with _open(place, bundle_copy, strategy) as runtime:
        runtime.run(image)
        before, held = _device_memory(), _held_by_pytorch()
        for _ in range(place.n_masks):
            runtime.run(image)
        gc.collect()
        assert _device_memory() <= before + place.memory_slack
        assert _held_by_pytorch() <= held


def _held_by_pytorch():
    """Return the bytes of its tensors on the device: what it keeps beside them hides that a few are not let go."""
    return torch.cuda.memory_allocated(0) if torch.cuda.is_available() else 0


def _device_memory():
    """Return the bytes in use on the device, or what the stand-in for the driver has given out."""
    if "driver" in FakeTensorRT.notes:
        return sum(array.nbytes for array in FakeTensorRT.notes["driver"].memory.values())
    if not torch.cuda.is_available():
        pytest.skip("the stand-in for ONNX Runtime works in the memory of its CPU provider")
    free, total = torch.cuda.mem_get_info(0)
    return total - free

"""The fused model decides and computes what the parts do."""

import itertools

import numpy as np
import onnx
import pytest
import torch

from export.bundle import Bundle
from export.check import OnnxReference
from export.fused import fuse_parts
from export.fused_spec import FORCE_DROP, FORCE_KEEP


def _fuse(bundle):
    return fuse_parts(
        bundle.network, {p.name: bundle.part_path(p).read_bytes() for p in bundle.network.parts if p.kind != "full"}
    )


@pytest.fixture(scope="module")
def fused(tiny):
    return OnnxReference(_fuse(Bundle.open(tiny.bundle)))


@pytest.mark.parametrize("bits", list(itertools.product([False, True], repeat=3)))
def test_forced_bits_equal_the_masked_forward(tiny, fused, preprocessed, torch_logits, bits):
    image, keep = preprocessed(tiny.model, 1), np.array([bits])
    force = np.where(keep[0], FORCE_KEEP, FORCE_DROP).astype(np.uint8)
    answer = fused.run({"image": image, "force": force})
    np.testing.assert_array_equal(answer["keep"], keep[0])
    np.testing.assert_allclose(answer["logits"], torch_logits(tiny.model, image, keep), atol=1e-4)


def test_policy_decides_where_nothing_is_forced(tiny, fused, preprocessed):
    images = preprocessed(tiny.model, 8)
    with torch.inference_mode():
        expected = tiny.model.keep_probability(torch.from_numpy(images)).numpy() >= 0.5
    kept = [fused.run({"image": images[i : i + 1]})["keep"] for i in range(8)]
    np.testing.assert_array_equal(np.stack(kept), expected)


def test_one_forced_bit_leaves_the_others_to_the_policy(fused, tiny, preprocessed):
    image = preprocessed(tiny.model, 1)
    free = fused.run({"image": image})["keep"]
    force = np.array([FORCE_DROP if free[0] else FORCE_KEEP, 0, 0], dtype=np.uint8)
    np.testing.assert_array_equal(fused.run({"image": image, "force": force})["keep"], [not free[0], *free[1:]])


def test_without_a_policy_network_everything_is_kept(export_random, preprocessed, torch_logits):
    plain = export_random("resnet8", has_policy=False)
    image = preprocessed(plain.model, 1)
    answer = OnnxReference(_fuse(Bundle.open(plain.bundle))).run({"image": image})
    assert answer["keep"].all()
    np.testing.assert_allclose(answer["logits"], torch_logits(plain.model, image, np.ones((1, 3), bool)), atol=1e-4)


def test_mask_of_the_network_decides_where_nothing_is_forced(export_random, preprocessed, torch_logits):
    tuned = export_random("resnet8", has_policy=False, mask="011")
    image = preprocessed(tuned.model, 1)
    answer = OnnxReference(_fuse(Bundle.open(tuned.bundle))).run({"image": image})
    assert answer["keep"].tolist() == [False, True, True]
    np.testing.assert_allclose(answer["logits"], torch_logits(tuned.model, image, answer["keep"][None]), atol=1e-4)


def test_fused_model_has_an_if_for_each_block_and_each_weight_once(tiny):
    bundle = Bundle.open(tiny.bundle)
    model = onnx.ModelProto.FromString(_fuse(bundle))
    assert sum(node.op_type == "If" for node in model.graph.node) == bundle.network.n_blocks
    parts = sum(bundle.part_path(p).stat().st_size for p in bundle.network.parts if p.kind != "full")
    assert model.ByteSize() < 1.1 * parts

"""Parts that take pixels compute what the host's preprocessing and the exported part compute."""

import numpy as np
import onnx
import pytest

from bdtool.errors import ExportError
from bdtool.models.parts import network_spec, part_modules
from bdtool.runtime.preprocess import preprocess
from bdtool.specs import IMAGE, NetworkSpec
from export.bundle import Bundle
from export.check import OnnxReference
from export.compose import compose_parts
from export.fused import fuse_parts
from export.half import half_from_fp32
from export.onnx_model import OnnxExporter, fold_batch_norm
from export.pixels import pixels_from_preprocessed
from export.pixels_spec import pixels_key


@pytest.fixture(scope="module")
def bundle(tiny):
    return Bundle.open(tiny.bundle)


def _model(bundle, part):
    return bundle.part_path(part).read_bytes()


@pytest.mark.parametrize("arch", ["resnet32", pytest.param("resnet101", marks=pytest.mark.slow)])
def test_stem_and_policy_equal_the_hosts_preprocessing(random_model, shared_traces, pixels, arch):
    model = random_model(arch)
    network, modules, exporter = network_spec(model), part_modules(model), OnnxExporter()
    images = pixels(model, 3)
    ready = preprocess(images, network.preprocessing)
    reading = [part for part in network.parts if part.reads_image]
    assert [part.kind for part in reading] == ["policy", "stem"]
    for part in reading:
        data = exporter.onnx_from_module(fold_batch_norm(modules[part.name]), part)
        of_pixels = pixels_from_preprocessed(data, part, network.preprocessing)
        onnx.checker.check_model(onnx.ModelProto.FromString(of_pixels), full_check=True)
        [expected] = OnnxReference(data).run({"image": ready}).values()
        [actual] = OnnxReference(of_pixels).run({"image": images}).values()
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
        assert np.ptp(expected) > 1e-3


def test_every_value_of_every_channel_is_normalised(bundle):
    stem = bundle.network.part("stem")
    images = np.random.default_rng(0).permuted(np.resize(np.arange(256, dtype=np.uint8), (2, 32, 32, 3)))
    of_pixels = pixels_from_preprocessed(_model(bundle, stem), stem, bundle.network.preprocessing)
    expected = OnnxReference(_model(bundle, stem)).run({"image": preprocess(images, bundle.network.preprocessing)})
    np.testing.assert_allclose(OnnxReference(of_pixels).run({"image": images})["y"], expected["y"], atol=1e-5)


def test_half_precision_stem_takes_pixels(bundle, tiny, pixels):
    stem, size, images = bundle.network.part("stem"), bundle.network.preprocessing, pixels(tiny.model, 2)
    half = half_from_fp32(_model(bundle, stem), stem, "fp16")
    of_pixels = pixels_from_preprocessed(half, stem, size)
    expected = OnnxReference(half).run({"image": preprocess(images, size)})["y"]
    np.testing.assert_array_equal(OnnxReference(of_pixels).run({"image": images})["y"], expected)


def test_joined_and_fused_models_take_pixels(bundle, tiny, pixels, torch_logits):
    network, images = bundle.network.with_pixels(), pixels(tiny.model, 1)
    ready = preprocess(images, network.preprocessing)
    pieces = {
        part.name: pixels_from_preprocessed(_model(bundle, part), part, network.preprocessing) for part in network.parts
    }
    kept = [part for part in network.parts if part.kind in ("stem", "block", "head")]
    joined = OnnxReference(compose_parts("full", [(part, pieces[part.name]) for part in kept]))
    [logits] = joined.run({"image": images}).values()
    np.testing.assert_allclose(logits, torch_logits(tiny.model, ready), atol=1e-4)
    fused = OnnxReference(fuse_parts(network, pieces)).run({"image": images, "force": np.zeros(3, np.uint8)})
    np.testing.assert_allclose(fused["logits"], torch_logits(tiny.model, ready, fused["keep"][None]), atol=1e-4)


def test_spec_says_what_goes_in(bundle):
    network: NetworkSpec = bundle.network.with_pixels()
    assert (bundle.network.takes_pixels, network.takes_pixels) == (False, True)
    for part, exported in zip(network.parts, bundle.network.parts, strict=True):
        if IMAGE not in part.reads:
            assert part == exported
            continue
        [image] = part.inputs
        assert (image.shape, image.dtype) == (("N", 32, 32, 3), "uint8")
        assert part.outputs == exported.outputs


def test_parts_that_read_no_image_stay_as_they_are(bundle):
    block = bundle.network.part("block_00")
    changed = pixels_from_preprocessed(_model(bundle, block), block, bundle.network.preprocessing)
    assert onnx.ModelProto.FromString(changed) == onnx.ModelProto.FromString(_model(bundle, block))


def test_model_without_the_image_is_refused(bundle):
    stem, block = bundle.network.part("stem"), bundle.network.part("block_00")
    message = r"part 'stem': expected a float32 input 'image' for preprocessed images, its ONNX has x\. Export"
    with pytest.raises(ExportError, match=message):
        pixels_from_preprocessed(_model(bundle, block), stem, bundle.network.preprocessing)
    twice = pixels_from_preprocessed(_model(bundle, stem), stem, bundle.network.preprocessing)
    with pytest.raises(ExportError, match="expected a float32 input 'image'"):
        pixels_from_preprocessed(twice, stem, bundle.network.preprocessing)


def test_key_changes_with_what_is_inside(random_model):
    size = random_model("resnet8").spec.preprocessing
    from dataclasses import replace

    keys = {
        pixels_key(replace(size, **change)) for change in ({}, {"mean": (0, 0, 0)}, {"std": (1, 1, 1)}, {"width": 8})
    }
    assert len(keys) == 4
    assert pixels_key(replace(size, resize=40)) in keys  # the host's part

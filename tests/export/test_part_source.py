"""Parts of a precision are the bundle's; where it has none, a backend that converts gets them from the FP32 ones."""

import pytest

from bdtool.errors import BundleError, UsageError
from export.bundle import Bundle
from export.half import half_from_fp32
from export.part_source import PartSource


@pytest.fixture(scope="module")
def bundle(tiny):
    return Bundle.open(tiny.bundle)


def test_exported_parts_are_the_files_of_the_bundle(bundle):
    source = PartSource(bundle, "fp32", converts_fp16=True)
    part = source.network.part("block_00")
    assert not source.converted
    assert source.network == bundle.network
    assert (source.model(part), source.key(part)) == (bundle.part_bytes(part), bundle.part_sha256(part))


def test_half_parts_are_made_from_the_exported_ones(bundle):
    source = PartSource(bundle, "fp16", converts_fp16=True)
    part = source.network.part("block_00")
    assert source.converted
    assert part.inputs[0].dtype == "float16"
    assert source.model(part) == half_from_fp32(bundle.part_bytes(part), part, "fp16")
    assert source.key(part).startswith(f"{bundle.part_sha256(part)}+half")
    policy = source.network.part("policy")
    assert source.model(policy) == bundle.part_bytes(policy)


def test_parts_that_nobody_makes_are_refused(bundle):
    for precision, converts in (("fp16", False), ("bf16", True), ("int8", True)):
        with pytest.raises(BundleError, match=f"has no {precision} parts; it has fp32"):
            PartSource(bundle, precision, converts_fp16=converts)
    with pytest.raises(UsageError, match="unknown precision 'fp8'"):
        PartSource(bundle, "fp8", converts_fp16=True)

"""An opened bundle and the backend, for the tests of engines."""

import pytest

from engines.onnxrt import OnnxRuntimeBackend
from export.bundle import Bundle


@pytest.fixture(scope="session")
def cpu():
    """ONNX Runtime with the threads it takes by default: a process keeps their number, so all tests share it."""
    return OnnxRuntimeBackend()


@pytest.fixture(scope="session")
def tiny_bundle(tiny):
    return Bundle.open(tiny.bundle)


@pytest.fixture(scope="session")
def native(cpu, tiny_bundle):
    """The layout that ONNX Runtime's convolutions use on this processor."""
    layout = cpu.activation_layout(tiny_bundle.network)
    if layout == "NCHW":
        pytest.skip("ONNX Runtime has no NCHWc convolutions on this processor")
    return layout

"""Where the tests of GPU backends run: on this machine's GPU, and on stand-ins, which leave only the device untried."""

import fcntl
import os
from typing import NamedTuple

import pytest

from bdtool.errors import BdtoolError
from engines.registry import identify_backend, open_backend
from tests.fake_onnxruntime import install_onnxruntime
from tests.fake_tensorrt import install_gpu


class Place(NamedTuple):
    backend: str
    device: str
    n_masks: int  # compared with PyTorch
    tolerance: float
    memory_slack: int  # bytes that the driver, or another process, may take meanwhile


STAND_INS = {"tensorrt, stand-in": install_gpu, "onnxruntime, stand-in": install_onnxruntime}
BACKENDS = ("torch", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-tensorrt")


@pytest.fixture(autouse=True)
def alone_on_the_gpu(request, tmp_path_factory):
    """Processes that run tests in parallel (`make test`) take turns: free memory and latency are of one of them."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    own = tmp_path_factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with (common / "gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(params=[*STAND_INS, *(pytest.param(name, marks=pytest.mark.gpu) for name in BACKENDS)])
def place(request, monkeypatch, tmp_path):
    """A backend that works here; skipped with the reason where it does not."""
    if request.param in STAND_INS:
        STAND_INS[request.param](monkeypatch, tmp_path)
        return Place(request.param.partition(",")[0], "cuda:0", 8, 1e-4, 0)
    try:
        identify_backend(request.param, "cuda:0")
        open_backend(request.param, "cuda:0")
    except BdtoolError as error:
        pytest.skip(str(error))
    return Place(request.param, "cuda:0", 1000, 1e-3, 2 * 2**20)  # float32 in another summing order

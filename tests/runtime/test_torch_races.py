"""As `test_races.py`, for backend `torch`: on PyTorch's current stream, which callers change."""

import gc

import numpy as np
import pytest
import torch

from bdtool import Orchestrator
from bdtool.runtime.path_cache import PathOptions
from engines.engine_set import EngineSet
from engines.graph_modes import GraphPlan
from engines.torchrt import TorchBackend
from export.bundle import Bundle
from tests.fake_torch import FakeTorch, Stream
from tests.race_detector import RaceDetector
from tests.runtime.test_races import MASKS, GpuImages, _read

pytestmark = pytest.mark.slow

KEEP = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=bool)
HOME, FIRST, SECOND, OTHER = 0x66, 0x55, 0x44, 0x99  # streams: of the opening, of calls, and of a reader
STRATEGIES = (
    *("chain", "path", "full", "full@replay"),
    *(f"graph@{mode}" for mode in ("policy-cache", "switch", "path-cache")),
)


@pytest.fixture
def gpu(monkeypatch):
    pytest.importorskip("cuda.bindings.driver")
    gpu = FakeTorch(monkeypatch, RaceDetector())
    with gpu.running():
        yield gpu
        gc.collect()
        gpu.collect()
    gpu.driver.check()


def _opened(tiny, name):
    strategy, _, mode = name.partition("@")
    bundle, backend = Bundle.open(tiny.bundle), TorchBackend(device="cuda:0")
    backend._fuses = False
    files = {p.name: bundle.part_path(p).read_bytes() for p in bundle.network.parts}
    engines = {p.name: backend.load(p, files[p.name], layout="NCHW") for p in bundle.network.parts}
    graphs = GraphPlan(modes=("path-cache" if mode == "replay" else mode,), is_forced=True) if mode else None
    paths = PathOptions(ahead=list(KEEP[:1]), background=False) if strategy == "path" else MASKS
    runtime = Orchestrator(
        bundle.network,
        backend,
        EngineSet(engines, backend=backend, files=files),
        strategy=strategy,
        max_batch=8,
        paths=paths,
        graphs=graphs,
    )
    return runtime, None if strategy == "full" else KEEP


def _on(gpu, stream):
    return torch.cuda.stream(Stream(gpu, stream))


@pytest.mark.parametrize("name", STRATEGIES)
def test_images_on_streams_that_change(gpu, tiny, preprocessed, torch_logits, name):
    images = preprocessed(tiny.model, 3)
    with _on(gpu, HOME):
        runtime, keep = _opened(tiny, name)
    expected = torch_logits(tiny.model, images, keep)
    with runtime:
        for stream in (0, FIRST, 0):
            with _on(gpu, stream):
                np.testing.assert_allclose(runtime.run(images, policy=keep).logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_logits_that_are_read_late(gpu, tiny, preprocessed, torch_logits, name):
    images = preprocessed(tiny.model, 3)
    with _on(gpu, HOME):
        runtime, keep = _opened(tiny, name)
    expected, late = torch_logits(tiny.model, images, keep), []
    for stream in (HOME, FIRST, SECOND, 0):
        with _on(gpu, stream):
            late.append(GpuImages(gpu.driver, images).run(runtime, keep).logits)
        np.testing.assert_allclose(_read(gpu.driver, late[-1]), expected, atol=1e-4)
    with _on(gpu, HOME):
        runtime.close()
        del runtime
        gc.collect()
        gpu.collect()
    for logits in late:
        np.testing.assert_allclose(_read(gpu.driver, logits, OTHER), expected, atol=1e-4)
    Stream(gpu, OTHER).synchronize()  # only the default stream's work may outlast the logits
    for logits in late:
        np.testing.assert_allclose(_read(gpu.driver, logits), expected, atol=1e-4)

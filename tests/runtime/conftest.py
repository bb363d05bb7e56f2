"""A network made by hand that the fake backend runs, with a pure-Python oracle of what it computes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from bdtool.runtime.orchestrator import Orchestrator
from bdtool.specs import NetworkSpec, PartSpec, Preprocessing, TensorSpec
from engines.engine_set import EngineSet
from engines.fake import FakeBackend, fake_value

N_STAGES, BLOCKS_PER_STAGE = 3, 2
CHANGES = (2, 4)  # blocks that change the shape, so that dropping them runs a shortcut


def _network(emits: tuple[str, ...], has_policy: bool) -> NetworkSpec:
    """Three stages of two blocks; a block writes `x` and one score per name in `emits`."""
    image = TensorSpec(name="image", shape=("N", 3, 4, 4))
    parts = []
    if has_policy:
        probability = TensorSpec(name="keep_probability", shape=("N", N_STAGES * BLOCKS_PER_STAGE))
        parts.append(_part("policy", "policy", None, image, probability, writes="keep_probability", reads="image"))
    parts.append(_part("stem", "stem", None, image, _map("y", 0), reads="image"))
    for k in range(N_STAGES * BLOCKS_PER_STAGE):
        before, after = _map("x", max(0, k - 1) // BLOCKS_PER_STAGE), _map("y", k // BLOCKS_PER_STAGE)
        parts.append(_part(f"block_{k:02}", "block", k, before, after, emits=emits))
        if k in CHANGES:
            parts.append(_part(f"shortcut_{k:02}", "shortcut", k, before, after))
    logits = TensorSpec(name="logits", shape=("N", 2))
    parts.append(_part("head", "head", None, _map("x", N_STAGES - 1), logits, writes="logits"))
    parts.append(_part("full", "full", None, image, logits, reads="image", writes="logits"))
    return NetworkSpec(
        arch="hand-made",
        n_classes=2,
        labels=None,
        preprocessing=Preprocessing(height=4, width=4, mean=(0, 0, 0), std=(1, 1, 1)),
        stages=(BLOCKS_PER_STAGE,) * N_STAGES,
        parts=tuple(parts),
    )


def _map(name: str, stage: int) -> TensorSpec:
    return TensorSpec(name=name, shape=("N", 2 * 2**stage, 4 // 2**stage, 4 // 2**stage))


def _part(name, kind, index, source, result, *, reads="x", writes="x", emits=()) -> PartSpec:
    extra = tuple(TensorSpec(name=emitted, shape=("N", 1)) for emitted in emits)
    return PartSpec(
        name=name,
        kind=kind,
        index=index,
        reads=(reads,),
        writes=(writes, *emits),
        inputs=(source,),
        outputs=(result, *extra),
        flops=1,
    )


class Fake(NamedTuple):
    backend: FakeBackend
    network: NetworkSpec
    runtime: Orchestrator


@pytest.fixture(scope="session")
def fake() -> Callable[..., Fake]:
    """Return a function that opens the network on a fake backend of its own."""

    def opened(*, emits=(), has_policy=True, strategy="chain", min_batch=1, max_batch=4, paths=None) -> Fake:
        backend, network = FakeBackend(), _network(tuple(emits), has_policy)
        files = {part.name: b"{}" for part in network.parts}
        engines = {part.name: backend.load(part, files[part.name], layout="NCHW") for part in network.parts}
        joinable = EngineSet(engines, backend=backend, files=files, min_batch=min_batch)
        runtime = Orchestrator(network, backend, joinable, strategy=strategy, max_batch=max_batch, paths=paths)
        return Fake(backend, network, runtime)

    return opened


@pytest.fixture(scope="session")
def fake_oracle() -> Callable[..., float]:
    """Return what the fake backend's chain makes of an image full of `value`, image by image and without buffers."""

    def logit(value: float, keep) -> float:
        v = fake_value("stem", 0, np.float64(value))
        for k, kept in enumerate(keep):
            if kept:
                v = fake_value("block", k, v)
            elif k in CHANGES:
                v = fake_value("shortcut", k, v)
        return float(fake_value("head", 0, v))

    return logit


@pytest.fixture(scope="session")
def images_of() -> Callable[..., np.ndarray]:
    """Return preprocessed images, each full of one of the values."""
    return lambda values: np.tile(np.array(values, np.float32).reshape(-1, 1, 1, 1), (1, 3, 4, 4))

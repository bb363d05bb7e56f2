"""The engines of one bundle, loaded together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bdtool.specs import NetworkSpec, PartSpec
from engines.base import PLAIN_LAYOUT, Backend, Engine, JoinedEngine
from export.fused_spec import fused_spec


class EngineSet(Mapping[str, Engine]):
    """Loaded engines by part name, which can be joined into larger ones.

    `min_batch` is the smallest batch that all of them take, `max_batch` the largest; None: any.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        backend: Backend,
        files: Mapping[str, bytes],
        min_batch: int = 1,
        max_batch: int | None = None,
    ) -> None:
        self.min_batch = min_batch
        self.max_batch = max_batch
        self._engines = engines
        self._backend = backend
        self._files = files  # empty where nothing will be joined: they are as large as the engines

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    def join(self, joined: PartSpec, parts: Sequence[PartSpec]) -> JoinedEngine:
        """Return one engine that runs `parts` in order, and the memory that it takes.

        Args:
            joined: describes the result; it reads images and writes logits.
        """
        return self._backend.join(joined, [(part, self._files[part.name]) for part in parts])

    def with_others(self, others: EngineSet) -> EngineSet:
        """Return these engines with `others`, of the same backend, in the place of those of the same names."""
        files = {**self._files, **others._files}
        engines = {**self._engines, **others._engines}
        limits = [most for most in (self.max_batch, others.max_batch) if most is not None]
        least, most = max(self.min_batch, others.min_batch), min(limits, default=None)
        return EngineSet(engines, backend=self._backend, files=files, min_batch=least, max_batch=most)

    def fuse(self, network: NetworkSpec) -> Engine:
        """Return one engine of the whole network, policy included, with an `If` for each block."""
        return self._backend.load(fused_spec(network), self._backend.fuse(network, self._files), layout=PLAIN_LAYOUT)


def smallest_batch_of(engines: Mapping[str, Engine]) -> int:
    """Return the smallest batch that all of these engines take."""
    return engines.min_batch if isinstance(engines, EngineSet) else 1

"""A bundle's engines for one backend, loaded; what the bundle lacks for this machine is built first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bdtool.errors import EngineError
from bdtool.runtime.factory import parts_for
from bdtool.runtime.read_only import is_read_only, tell_not_kept, temporary_engines
from bdtool.specs import NetworkSpec, PartSpec
from bdtool.words import counted
from engines.base import Backend, Engine
from engines.engine_files import ChangedEngineError
from engines.engine_record import EngineRecord
from engines.engine_set import EngineSet
from engines.store import EngineStore
from export.bundle import Bundle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """Engines by part name, and the network as they take it: images as pixels, or preprocessed."""

    network: NetworkSpec
    engines: Mapping[str, Engine]


class Loader:
    """Loads the engines that one strategy needs; `store` is where they are, or are built.

    Args:
        build_in: directory for engines that `store` lacks, which then stays as it is; None builds them in it, or for
            a read-only bundle in a temporary directory.
    """

    def __init__(
        self, bundle: Bundle, store: EngineStore, backend: Backend, *, strategy: str, build_in: Path | None = None
    ) -> None:
        self.store = store  # after `load` the one that the engines are from
        self._own = store  # of this target alone
        self._bundle = bundle
        self._backend = backend
        self._strategy = strategy
        self._build_in = build_in
        self._loaded: EngineSet | None = None
        self._preprocessed: Loaded | None = None

    def load(self) -> Loaded:
        """Load every engine of the strategy.

        Raises:
            EngineError: one does not build, or cannot be loaded.
        """
        parts = parts_for(self._strategy, self._own.network)
        source = self._own.source
        others = [part for part in self._own.network.parts if part not in parts and source.holds(part)]
        self.store, self._loaded = self._load(self._own, parts, build=[*parts, *others])
        return Loaded(self._own.network, self._loaded)

    @property
    def max_batch(self) -> int:
        """The largest batch that the bundle and the engines of `load` take at once."""
        assert self._loaded is not None  # `load` comes first
        most = self._bundle.manifest.max_batch
        return most if self._loaded.max_batch is None else min(most, self._loaded.max_batch)

    def load_preprocessed(self) -> Loaded:
        """Load engines that take preprocessed images, beside those of `load`, with which they share all other parts.

        Raises:
            EngineError: one does not build, or cannot be loaded.
        """
        if self._preprocessed is None:
            assert self._loaded is not None  # `load` comes first
            store = self._own.for_preprocessed()
            parts = [part for part in parts_for(self._strategy, store.network) if part.reads_image]
            _, engines = self._load(store, parts, build=parts)
            self._preprocessed = Loaded(store.network, self._loaded.with_others(engines))
        return self._preprocessed

    def _load(
        self, store: EngineStore, parts: Sequence[PartSpec], *, build: Sequence[PartSpec]
    ) -> tuple[EngineStore, EngineSet]:
        """Load the engines of `parts`, from where they are; where one is missing, `build` is built first."""
        with ExitStack() as stack:
            found = store.find_complete(parts)
            if found is not None:
                try:
                    return self._load_from(*found)
                except ChangedEngineError as exc:
                    logger.info("%s", exc)
            store = self._build(store, build, stack)
            return self._load_from(store, store.find(parts, check_digests=False))

    def _load_from(self, store: EngineStore, records: Mapping[str, EngineRecord]) -> tuple[EngineStore, EngineSet]:
        return store, store.load(self._backend, records, joinable=self._strategy in ("path", "fused"))

    def _build(self, store: EngineStore, parts: Sequence[PartSpec], stack: ExitStack) -> EngineStore:
        """Build what the store lacks, there or elsewhere, and return the store that has it."""
        found = store.find(parts)
        store.require_sources([part for part in parts if part.name not in found])  # elsewhere none of `found` is seen
        store = self._store_to_build_in(store, stack)
        logger.info(
            "building the %s engines that %s lacks for %s", store.precision, self._bundle.path, store.identity.target
        )
        statuses = store.build(lambda: self._backend, parts=parts)
        failed = [status for status in statuses if status.status == "failed"]
        if failed:
            n_failed = counted(len(failed), f"{store.precision} engine")
            raise EngineError(f"{n_failed} did not build; the first: {failed[0].message}")
        return store

    def _store_to_build_in(self, store: EngineStore, stack: ExitStack) -> EngineStore:
        if self._build_in is not None:
            return store.placed(self._build_in)
        path = self._bundle.path
        if not is_read_only(path):
            return store
        tell_not_kept(path, f"the engines {store.directory.name}")
        return store.placed(temporary_engines(path, stack))

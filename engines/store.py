"""Engines in a bundle: built once for each content and target, found again by what they were built from.

`engines/<backend>-<version>-<target>-<precision>/` holds one engine file and one record for each part. The record says
what the engine was built from; an engine whose record does not fit is built again. `engine_files` has the files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from bdtool.errors import BundleError, EngineError, ExportError
from bdtool.specs import NetworkSpec, PartSpec
from engines.base import (
    PLAIN_LAYOUT,
    Backend,
    BackendIdentity,
    BuiltEngine,
    Engine,
    HostCodeBackend,
    LayoutError,
)
from engines.engine_files import EngineFiles
from engines.engine_record import EngineRecord
from engines.engine_set import EngineSet
from engines.trt_options import has_host_code, is_of_recipe, largest_batch, smallest_batch
from export.bundle import Bundle, UnfitPartError
from export.files import advice_on, exclusive_lock, remove_leftovers, sha256_of_bytes
from export.part_source import PartSource
from export.pixels_spec import pixels_key

logger = logging.getLogger(__name__)

_ABANDONED_S = 3600  # masks and recommendations are written beside the engines without the lock of a build
_LOCK = ".build.lock"


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    """What happened to one part in a build."""

    name: str
    status: Literal["built", "cached", "failed"]
    seconds: float
    message: str = ""
    record: EngineRecord | None = None

    @property
    def cached(self) -> bool:
        return self.status == "cached"


class EngineStore:
    """The engines of one bundle for one backend, target and precision, in `directory`.

    Args:
        settings: what it builds with, where engines of any settings fit (`identity.settings` is None).

    Attributes:
        source: the ONNX parts that the engines are built from.

    Raises:
        BundleError, UsageError: there are no parts of that precision; as `PartSource`.
    """

    def __init__(
        self,
        bundle: Bundle,
        identity: BackendIdentity,
        *,
        precision: str = "fp32",
        directory: Path | None = None,
        settings: str = "",
    ) -> None:
        self.source = PartSource(bundle, precision, converts_fp16=identity.converts_fp16)
        self._bundle = bundle
        self.identity = identity
        self.precision = precision
        self.settings = settings if identity.settings is None else identity.settings
        name = f"{identity.name}-{identity.version}-{identity.target}-{precision}"
        self.directory = (directory or bundle.engines_path) / name
        self._files = EngineFiles(self.directory, suffix=identity.suffix)

    @cached_property
    def network(self) -> NetworkSpec:
        """The bundle's network, its images and activations in the types that these engines have."""
        network = self.source.network
        return network.with_pixels() if self.identity.takes_pixels else network

    def for_preprocessed(self) -> EngineStore:
        """Return the store of engines that take preprocessed images, in the same directory under names of their own.

        They run together with those of this store, so that only such fit as are built with the same settings.
        """
        identity = replace(self.identity, takes_pixels=False, settings=self.settings or None)
        return self._alike(identity, self.directory.parent)

    def placed(self, directory: Path) -> EngineStore:
        """Return the store of such engines in another place."""
        return self._alike(self.identity, directory)

    def build(
        self,
        open_backend: Callable[[], Backend],
        *,
        resume: bool = True,
        parts: Sequence[PartSpec] | None = None,
        on_part: Callable[[PartStatus], None] = lambda status: None,
    ) -> list[PartStatus]:
        """Build whatever has no fitting engine; return each part's status. A part that fails does not stop the others.

        One build at a time works on a directory: libraries do not build a part to the same bytes twice, so that of two
        at once the record of one would lie beside the engine of the other. Whoever waits finds what the other built.

        Args:
            open_backend: called only when there is something to build.
            resume: take up engines that fit; False builds every part again.
            parts: of `network`, to build no others; None builds all, but for a `full` that `bdtool pack` left out.

        Raises:
            BundleError: the engines cannot be written, or a part differs from its digest in the manifest, or was left
                out by `bdtool pack`.
        """
        records = self.find(parts) if resume else {}
        wanted = parts or [part for part in self.network.parts if part.name in records or self._is_needed(part)]
        self.require_sources([part for part in wanted if part.name not in records])
        if len(records) == len(wanted):
            statuses = [_cached(records[part.name]) for part in wanted]
            for status in statuses:
                on_part(status)
            return statuses
        backend = open_backend()  # first: one that is not to be had leaves no empty directory behind
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with exclusive_lock(self.directory / _LOCK, purpose=f"a build of {self.directory.name}", wait=True):
                remove_leftovers(self.directory, min_age_s=_ABANDONED_S)
                return self._build_missing(backend, wanted, self.find(wanted) if resume else {}, on_part)
        except OSError as exc:
            raise BundleError(
                f"{self.directory}: engines cannot be written ({exc.strerror or exc}). The bundle and the finished "
                f"engines are whole; {advice_on(exc)} and run the same command again"
            ) from exc

    def require_sources(self, parts: Sequence[PartSpec]) -> None:
        """Raise unless engines of these parts can be built.

        Raises:
            BundleError: `bdtool pack` left one out.
        """
        for part in parts:
            if not self.source.holds(part):
                try:
                    self.source.model(part)
                except BundleError as exc:
                    raise BundleError(
                        f"an engine of part {part.name!r} has to be built for {self.directory.name}"
                        f"{self._what_is_there(part)}. {exc}"
                    ) from exc

    def _what_is_there(self, part: PartSpec) -> str:
        """Say why no engine fits, as the end of a sentence: it is damaged, or there are others; "" for neither."""
        record = self._fitting_record(part)
        if record is not None and not self._files.whole([record]):
            return f", as {record.file} there was changed or cut short (copy this bundle again)"
        others = sorted({path.name for path in self._bundle.engines_path.glob("*")} - {self.directory.name})
        return f" (there are {', '.join(others)})" if others else ""

    def find(self, parts: Sequence[PartSpec] | None = None, *, check_digests: bool = True) -> dict[str, EngineRecord]:
        """Return the records of `parts` (None: all) that fit the bundle; their engines are whole and of one layout.

        `check_digests` False leaves the look at whether they are whole to `load`, which reads them anyway.
        """
        fitting = [record for part in parts or self.network.parts if (record := self._fitting_record(part))]
        if check_digests:
            fitting = self._files.whole(fitting)
        layouts = {record.layout for record in fitting}
        return {record.part: record for record in fitting} if len(layouts) <= 1 else {}

    def nearest(self, parts: Sequence[PartSpec]) -> EngineStore:
        """Return the store that a runtime would take its engines of `parts` from; this one where none has them all."""
        found = self.find_complete(parts)
        return self if found is None else found[0]

    def find_complete(self, parts: Sequence[PartSpec]) -> tuple[EngineStore, dict[str, EngineRecord]] | None:
        """Return a store that has an engine of each of `parts` for this target, and their records; None: there is none.

        It is this one, or one whose engines were built for this target among others. `load` looks at whether the
        engines are whole.
        """
        for store in (self, *self._wider()):
            records = store.find(parts, check_digests=False)
            if len(records) == len(parts):
                return store, records
        return None

    def found_settings(self) -> str | None:
        """Return the settings of the engines that a runtime finds; None: there are none, or they are not all alike."""
        for store in (self, *self._wider()):
            settings = {record.settings for record in store.find(check_digests=False).values()}
            if settings:
                return settings.pop() if len(settings) == 1 else None
        return None

    def _wider(self) -> Iterator[EngineStore]:
        """Yield the stores beside this one whose target lists this store's among others, or is a wider one."""
        for target in self.identity.wider_targets:
            yield self._alike(replace(self.identity, target=target), self.directory.parent)
        if not self.identity.lists_targets:
            return
        name, version, own = self.identity.name, self.identity.version, self.identity.target
        start, end = f"{name}-{version}-", f"-{self.precision}"
        for directory in sorted(self.directory.parent.glob(f"{start}*{end}")):
            target = directory.name.removeprefix(start).removesuffix(end)
            if target != own and own in target.split("-"):
                yield self._alike(replace(self.identity, target=target), directory.parent)

    def _alike(self, identity: BackendIdentity, directory: Path) -> EngineStore:
        return EngineStore(
            self._bundle, identity, precision=self.precision, directory=directory, settings=self.settings
        )

    def load(self, backend: Backend, records: Mapping[str, EngineRecord], *, joinable: bool = False) -> EngineSet:
        """Load the engines of `records`, as `find` gave them.

        Args:
            joinable: keep the engine files in memory, for `EngineSet.join`.

        Raises:
            ChangedEngineError: one differs from the digest in its record.
            EngineError: the backend cannot load one.
        """
        if isinstance(backend, HostCodeBackend) and any(has_host_code(record.settings) for record in records.values()):
            backend.allow_host_code()  # they were built so on purpose, and a bundle is loaded by who trusts it
        engines: dict[str, Engine] = {}
        files: dict[str, bytes] = {}
        for name, record in records.items():
            if not record.loadable:
                raise EngineError(
                    f"part {name!r}: its engine was built without weights, for a program that refits it; build it "
                    "again without --strip-weights to run it here"
                )
            data = self._files.read(record)
            engines[name] = backend.load(self.network.part(name), data, layout=record.layout)
            if joinable:
                files[name] = data
        limits = [most for record in records.values() if (most := largest_batch(record.settings)) is not None]
        least = max((smallest_batch(record.settings) for record in records.values()), default=1)
        most = min(limits, default=None)
        return EngineSet(engines, backend=backend, files=files, min_batch=least, max_batch=most)

    def _is_needed(self, part: PartSpec) -> bool:
        """Say whether a build has to make the part's engine: nothing runs without the others, `full` is an extra."""
        return part.kind != "full" or self.source.holds(part)

    def _build_missing(
        self,
        backend: Backend,
        parts: Sequence[PartSpec],
        records: Mapping[str, EngineRecord],
        on_part: Callable[[PartStatus], None],
    ) -> list[PartStatus]:
        layout = backend.activation_layout(self.network)
        try:
            return self._build_all(backend, parts, records, layout, on_part)
        except LayoutError as exc:
            logger.warning("%s; building every part with plain %s activations instead", exc, PLAIN_LAYOUT)
            return self._build_all(backend, parts, {}, PLAIN_LAYOUT, on_part)

    def _build_all(
        self,
        backend: Backend,
        parts: Sequence[PartSpec],
        records: Mapping[str, EngineRecord],
        layout: str,
        on_part: Callable[[PartStatus], None],
    ) -> list[PartStatus]:
        statuses = []
        for part in parts:
            record = records.get(part.name)
            fits = record is not None and record.layout == layout
            statuses.append(_cached(record) if fits and record else self._build_part(backend, part, layout))
            on_part(statuses[-1])
        return statuses

    def _build_part(self, backend: Backend, part: PartSpec, layout: str) -> PartStatus:
        start = time.perf_counter()
        try:
            built = backend.build(part, self._model(part), layout=layout)
        except LayoutError:
            raise
        except (EngineError, ExportError, UnfitPartError) as exc:
            return PartStatus(name=part.name, status="failed", seconds=time.perf_counter() - start, message=str(exc))
        record = self._write(part, built)
        return PartStatus(name=part.name, status="built", seconds=time.perf_counter() - start, record=record)

    def _model(self, part: PartSpec) -> bytes:
        model = self.source.model(part)
        if self._normalises(part):
            from export.pixels import pixels_from_preprocessed  # loads onnx, which a build with nothing to do can spare

            model = pixels_from_preprocessed(model, part, self.network.preprocessing)
        return model

    def _normalises(self, part: PartSpec) -> bool:
        """Say whether the part's engine takes pixels."""
        return self.identity.takes_pixels and part.reads_image

    def _write(self, part: PartSpec, built: BuiltEngine) -> EngineRecord:
        record = EngineRecord(
            **{"settings": self.settings, **self._key(part)},
            layout=built.layout,
            file=self._files.engine_name(self._stem(part)),
            sha256=sha256_of_bytes(built.data),
            error=built.error,
            details=built.details,
            loadable=built.loadable,
        )
        self._files.write(self._stem(part), record, built)
        return record

    def _fitting_record(self, part: PartSpec) -> EngineRecord | None:
        """Return the part's record, if it was made from the same content and its engine is there and can be read."""
        record = self._files.record(self._stem(part))
        if record is None or not is_of_recipe(record.settings):
            return None
        fits = all(getattr(record, name) == value for name, value in self._key(part).items())
        return record if fits else None

    def _stem(self, part: PartSpec) -> str:
        """Return what the names of the part's files begin with."""
        return f"{part.name}.pixels" if self._normalises(part) else part.name

    def _key(self, part: PartSpec) -> dict[str, str]:
        """Return what must be equal for an engine to fit."""
        settings = {} if self.identity.settings is None else {"settings": self.identity.settings}
        pixels = f"+{pixels_key(self.network.preprocessing)}" if self._normalises(part) else ""
        return {
            **settings,
            "part": part.name,
            "onnx_sha256": self.source.key(part) + pixels,
            "backend": self.identity.name,
            "backend_version": self.identity.version,
            "target": self.identity.target,
            "precision": self.precision,
        }


def _cached(record: EngineRecord) -> PartStatus:
    return PartStatus(name=record.part, status="cached", seconds=0.0, record=record)

"""A candidate precision on trial: engines built outside the bundle, and their gates measured against fp32."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bdtool.calibrating.gates import Gates, Reference, measure_gates
from bdtool.data.batches import ImageSource
from bdtool.runtime.loading import Loader
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import PolicyRequest
from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How candidates are judged: on which images, along which paths, and with which bound.

    Attributes:
        max_accuracy_drop: percentage points.
        engines: directory outside the bundle for engines that the bundle lacks.
        on_share: called with the share of the images that is done, 0 to 1.
    """

    evaluation: ImageSource
    policy: PolicyRequest
    max_accuracy_drop: float
    threads: int | None
    engines: Path
    on_share: Callable[[float], None]

    def digest(self) -> str:
        """Return the digest of what candidates are judged on: the images, their labels, and the policy."""
        digest = hashlib.sha256(self.policy.name.encode())
        for batch in self.evaluation.batches(_BATCH):
            digest.update(batch.images.tobytes())
            digest.update(b"" if batch.labels is None else np.asarray(batch.labels, np.int64).tobytes())
        return digest.hexdigest()

    @contextmanager
    def open(self, bundle: Bundle, precision: str) -> Iterator[Orchestrator]:
        """Open the chain with the bundle's engines, or with some built outside it: a bundle stays as it was.

        Raises:
            EngineError: an engine does not build.
        """
        store = EngineStore(bundle, identify_backend("onnxruntime", "cpu"), precision=precision)
        library = open_backend("onnxruntime", "cpu", threads=self.threads)
        loader = Loader(bundle, store, library, strategy="chain", build_in=self.engines)
        loaded = loader.load()
        with Orchestrator(
            loaded.network, library, loaded.engines, strategy="chain", max_batch=loader.max_batch
        ) as runtime:
            yield runtime

    def reference(self, fp32: Orchestrator) -> Reference:
        return Reference(fp32, self.evaluation, self.policy)

    def measure(self, reference: Reference, other: Orchestrator) -> Gates:
        """Measure the gates of any engines against fp32."""
        total = self.evaluation.n_images
        done = 0

        def on_batch(n_images: int) -> None:
            nonlocal done
            done += n_images
            self.on_share(done / total)

        return measure_gates(reference, other, max_accuracy_drop=self.max_accuracy_drop, on_batch=on_batch)

    def unmeasured(self) -> Gates:
        """Return the gates of a candidate that was not run."""
        return Gates(
            policy=self.policy.name,
            n_images=0,
            input_source=self.evaluation.description,
            logits_error=None,
            logits_worst=None,
            changed_classes=None,
            policy_flips=None,
            accuracy_fp32=None,
            accuracy=None,
            max_accuracy_drop=self.max_accuracy_drop,
        )

    def keep_engines(self, bundle: Bundle, precision: str) -> None:
        """Take a candidate's engines into the bundle: their records say what they were built from, and they fit."""
        for directory in self.engines.glob(f"*-{precision}"):
            shutil.copytree(directory, bundle.engines_path / directory.name, dirs_exist_ok=True)

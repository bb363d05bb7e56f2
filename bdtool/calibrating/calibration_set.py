"""What a calibration learns from: images drawn from a data set, the paths they take, and the ranges along these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bdtool.data.batches import ImageSource, evenly_spread
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.policies import PolicyRequest
from bdtool.runtime.preprocess import preprocess
from bdtool.specs import NetworkSpec, dict_from_preprocessing
from calibration.cache import collect_ranges, content_key
from calibration.paths import PathBatch, PathWalker, TopUp, WatchedPart
from calibration.ranges import RangeCollector
from engines.registry import identify_backend
from export.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Images with the keep bits that the policy gives them; an image is decoded only when a batch needs it."""

    images: ImageSource
    keep: np.ndarray  # bool [n_images, K]
    digest: str  # of images and keep bits
    network: NetworkSpec

    @classmethod
    def decide(cls, images: ImageSource, policy: PolicyRequest, fp32: Orchestrator) -> CalibrationSet:
        """Let the policy decide; a learned one is the policy network of `fp32`."""
        digest = hashlib.sha256()
        rows = []
        for batch in images.batches(fp32.network.bulk_batch):
            keep = policy.given_at(batch.rows)
            if keep is None:
                keep = fp32.decide(batch.images)
            rows.append(keep)
            digest.update(batch.images.tobytes())
            digest.update(keep.tobytes())
        return cls(
            images=images,
            keep=np.concatenate(rows),
            digest=digest.hexdigest(),
            network=fp32.network,
        )

    def batches(self) -> Iterator[PathBatch]:
        """Yield all images, preprocessed, with their keep bits."""
        first = 0
        for batch in self.images.batches(self.network.bulk_batch):
            bits = self.keep[first : first + len(batch.images)]
            yield PathBatch(first=first, images=preprocess(batch.images, self.network.preprocessing), keep=bits)
            first += len(batch.images)

    def spread(self, n_images: int) -> PathBatch:
        """Return at most so many images as one batch, evenly spread."""
        rows = evenly_spread(n_images, len(self.keep))
        images = self.images.images_at(rows.tolist())
        return PathBatch(first=0, images=preprocess(images, self.network.preprocessing), keep=self.keep[rows])


@dataclass(frozen=True, kw_only=True)
class PathStatistics:
    """Histograms of what the fp32 parts' tensors hold along the paths of a calibration set."""

    source: CalibrationSet
    parts: Mapping[str, WatchedPart]
    collector: RangeCollector


def collect_statistics(
    bundle: Bundle, source: CalibrationSet, top_up: TopUp, work: Path, *, on_share: Callable[[float], None]
) -> PathStatistics:
    """Run the fp32 parts along the paths, or take up what an earlier run of the same content left in `work`.

    Args:
        on_share: called with the share of the images that is done, 0 to 1.
    """
    network = bundle.network
    watched = [part for part in network.parts if part.kind != "full"]
    parts = {part.name: WatchedPart(bundle.part_bytes(part), part) for part in watched}
    key = content_key(
        data=source.digest,
        parts=[bundle.part_sha256(part) for part in watched],
        preprocessing=dict_from_preprocessing(network.preprocessing),
        top_up={name: sorted(rows) for name, rows in top_up.rows.items()},
        onnxruntime=identify_backend("onnxruntime", "cpu").version,
        format=2,
    )
    done = 0

    def on_batch(n_images: int) -> None:
        nonlocal done
        done += n_images
        on_share(done / len(source.keep))

    walker = PathWalker(network, parts, top_up)
    collector = collect_ranges(walker, source.batches(), work / f"ranges-{key}.npz", on_batch=on_batch)
    return PathStatistics(source=source, parts=parts, collector=collector)

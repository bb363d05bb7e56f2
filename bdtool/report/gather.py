"""Put a report together: what its images were classified as, a few policies to compare with, a profile's figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.inspection import tuned_for
from bdtool.profiling.line import BlocksLine, fit_line
from bdtool.profiling.result import Profile
from bdtool.profiling.statistics import Samples
from bdtool.profiling.workload import BOUNDARY, heads_page
from bdtool.report.classified import Classified, classify_images, operating_points, points_at_other_thresholds
from bdtool.report.data import (
    ClassFigures,
    OperatingPoint,
    PartCost,
    Picture,
    PolicyUse,
    ReportData,
    StrategyLatency,
)
from bdtool.report.paper import paper_points
from bdtool.report.pictures import uri_from_pixels
from bdtool.report.request import ReportRequest
from bdtool.runtime.policies import PolicyRequest, bits_of, parse_policy_for
from bdtool.runtime.thresholds import threshold_of
from bdtool.specs import NetworkSpec
from export.bundle import Bundle

PERCENTILES = (90.0, 95.0, 99.0)
_N_DOMINANT = 3  # policies shown for each class
_N_PICTURES = 4  # pictures shown for each policy, and of the easiest and hardest
_MAX_PICTURED_CLASSES = 12  # the page grows by some 50 kB with each


def gather_report(
    profile: Profile,
    bundle: Bundle,
    source: ImageSource,
    request: ReportRequest,
    *,
    on_images: Callable[[int], None] = lambda n_images: None,
) -> ReportData:
    """Classify all images, and join what they show to a finished profile.

    Args:
        source: `request.limit` images, drawn.
        profile: of the same bundle, images and policy, at batch 1: all latencies come from it.
        on_images: called with how many images were classified since the last call; see `n_steps`.

    Raises:
        PolicyError: the policy does not fit the network, or has too few rows.
        ValueError: the profile is for another batch size.
    """
    if profile.settings.batch != 1:
        raise ValueError(f"a report shows one image at a time; got a profile of batch {profile.settings.batch}")
    bundle = bundle.with_threshold(threshold_of(request.policy))
    policy = parse_policy_for(bundle.network, request.policy)
    with request.place.open(bundle) as runtime:
        classified = classify_images(runtime, source, policy, on_images=on_images)
        points = operating_points(runtime, source, policy, classified, on_images=on_images)
    if policy.is_learned:
        points += points_at_other_thresholds(bundle, request.place, source, on_images=on_images)
    return report_from(profile, bundle, source, request, policy=policy, classified=classified, points=points)


def report_from(
    profile: Profile,
    bundle: Bundle,
    source: ImageSource,
    request: ReportRequest,
    *,
    policy: PolicyRequest,
    classified: Classified,
    points: tuple[OperatingPoint, ...],
) -> ReportData:
    """Put everything that was measured together; nothing runs any more, only the pictures shown are read again."""
    network = bundle.network
    flops = network.flops_per_image(classified.keep, with_policy=policy.is_learned)
    vectors = np.unique(classified.keep, axis=0)
    strategies = tuple(_strategy(name, samples, profile.samples["full"]) for name, samples in profile.samples.items())
    dynamic = next((samples for name, samples in profile.samples.items() if heads_page(name)), None)
    full_ms = profile.samples["full"].median_ms
    line = None if dynamic is None else fit_line(dynamic, full_ms, n_blocks=network.n_blocks)
    return ReportData(
        bundle=bundle.path.resolve().name,
        arch=network.arch,
        stages=network.stages,
        policy=policy.name,
        policy_network=profile.policy_network,
        input_source=source.description,
        is_real_input=source.is_real,
        n_images=len(classified.keep),
        accuracy=None if classified.correct is None else float(classified.correct.mean()),
        tuned_for=tuned_for(bundle.manifest.provenance),
        blocks_mean=float(classified.blocks_run.mean()),
        blocks_std=float(classified.blocks_run.std()),
        flops_mean=float(flops.mean()),
        flops_std=float(flops.std()),
        full_flops=network.full_flops,
        unique_policies=len(vectors),
        common_bits=bits_of(vectors[0]) if len(vectors) == 1 else None,
        boundary=BOUNDARY,
        n_timed_images=profile.n_images,
        strategies=strategies,
        line=line,
        points=points,
        paper_points=paper_points(network) if points else (),
        usage=tuple(classified.keep.mean(axis=0).tolist()),
        classes=_classes(network, source, classified, line),
        parts=_parts(network, profile.parts, classified.keep),
        warnings=tuple(profile.warnings),
        environment=_environment(profile, bundle),
        commands=request.commands(has_labels=source.has_labels),
    )


def _strategy(name: str, samples: Samples, full: Samples) -> StrategyLatency:
    return StrategyLatency(
        name=name,
        latency_ms=tuple(samples.latency_ms.tolist()),
        blocks_run=tuple(samples.blocks_run.tolist()),
        summary_ms=samples.summary(PERCENTILES),
        ratio_to_full=samples.ratio_to(full),
        variation=None if np.isnan(samples.variation) else samples.variation,
    )


def _classes(
    network: NetworkSpec, source: ImageSource, classified: Classified, line: BlocksLine | None
) -> tuple[ClassFigures, ...]:
    if classified.labels is None:
        return ()
    present = np.unique(classified.labels).tolist()
    pictured = set(_pictured(present, classified))
    return tuple(_class_figures(network, source, classified, line, k, with_pictures=k in pictured) for k in present)


def _pictured(present: list[int], classified: Classified) -> list[int]:
    """Return the classes that get pictures: all, or where they are many those that run the fewest and most blocks."""
    assert classified.labels is not None
    if len(present) <= _MAX_PICTURED_CLASSES:
        return present
    means = [float(classified.blocks_run[classified.labels == k].mean()) for k in present]
    order = [present[i] for i in np.argsort(means, kind="stable")]
    half = _MAX_PICTURED_CLASSES // 2
    return order[:half] + order[-half:]


def _class_figures(
    network: NetworkSpec,
    source: ImageSource,
    classified: Classified,
    line: BlocksLine | None,
    class_index: int,
    *,
    with_pictures: bool,
) -> ClassFigures:
    assert classified.correct is not None
    rows = np.flatnonzero(classified.labels == class_index)
    keep, blocks = classified.keep[rows], classified.blocks_run[rows]
    by_cost = rows[np.argsort(blocks, kind="stable")]
    by_cost_down = rows[np.argsort(-blocks, kind="stable")]
    shows_extremes = with_pictures and blocks.min() < blocks.max()

    def pictures(indices: np.ndarray) -> tuple[Picture, ...]:
        return tuple(_picture(network, source, classified, int(index)) for index in indices[:_N_PICTURES])

    return ClassFigures(
        label=network.label(class_index),
        n_images=len(rows),
        accuracy=float(classified.correct[rows].mean()),
        blocks_mean=float(blocks.mean()),
        blocks_std=float(blocks.std()),
        n_policies=len(np.unique(keep, axis=0)),
        line_ms=None if line is None else line.latency_ms(float(blocks.mean())),
        usage=tuple(keep.mean(axis=0).tolist()),
        dominant=_dominant(rows, keep, pictures) if with_pictures else (),
        easiest=pictures(by_cost) if shows_extremes else (),
        hardest=pictures(by_cost_down) if shows_extremes else (),
    )


def _dominant(
    rows: np.ndarray, keep: np.ndarray, pictures: Callable[[np.ndarray], tuple[Picture, ...]]
) -> tuple[PolicyUse, ...]:
    vectors, inverse, counts = np.unique(keep, axis=0, return_inverse=True, return_counts=True)
    order = [i for i in np.argsort(-counts, kind="stable")[:_N_DOMINANT] if counts[i] > 1]
    return tuple(
        PolicyUse(
            bits=bits_of(vectors[i]),
            n_images=int(counts[i]),
            share=float(counts[i] / len(rows)),
            pictures=pictures(rows[inverse == i]),
        )
        for i in order
    )


def _picture(network: NetworkSpec, source: ImageSource, classified: Classified, index: int) -> Picture:
    assert classified.correct is not None
    return Picture(
        uri=uri_from_pixels(source.image_at(index)),
        name=source.names[index],
        predicted=network.label(int(classified.predicted[index])),
        is_correct=bool(classified.correct[index]),
        blocks_run=int(classified.blocks_run[index]),
    )


def _parts(network: NetworkSpec, timed: list[dict[str, Any]], keep: np.ndarray) -> tuple[PartCost, ...]:
    """Return a row for each part, times from the profile, usage from the images."""
    by_name = {row["name"]: row for row in timed}
    usage = keep.mean(axis=0)
    shares = {"block": usage, "shortcut": 1 - usage}
    return tuple(
        PartCost(
            name=part.name,
            kind=part.kind,
            mean_ms=by_name.get(part.name, {}).get("mean_ms"),
            flops=part.flops,
            usage=float(shares[part.kind][part.index]) if part.kind in shares and part.index is not None else 1.0,
            share=by_name.get(part.name, {}).get("share"),
        )
        for part in network.parts
        if part.kind != "full"
    )


def _environment(profile: Profile, bundle: Bundle) -> dict[str, str]:
    return {
        **{name: str(value) for name, value in profile.environment.items()},
        "precision": profile.precision,
        "weights": f"sha256 {bundle.manifest.weights_sha256}",
        **{f"model: {name}": _text(value) for name, value in bundle.manifest.provenance.items()},
    }


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list) else str(value)

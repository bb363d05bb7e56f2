"""Reports from made-up figures: policies that vary, one that is fixed, and data without labels."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from bdtool.data.synthetic import synthetic_images
from bdtool.profiling.line import fit_line
from bdtool.profiling.statistics import Samples
from bdtool.report.data import (
    ClassFigures,
    OperatingPoint,
    PartCost,
    Picture,
    PolicyUse,
    ReportData,
    StrategyLatency,
)
from bdtool.report.paper import CIFAR10_POINTS
from bdtool.report.pictures import uri_from_pixels

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
STAGES = (5, 5, 5)


@pytest.fixture(scope="session")
def varied() -> ReportData:
    """A policy that differs between images; names and labels try to break out of the page."""
    chain, full = _samples(seed=0, varies=True), _samples(seed=1, varies=False)
    usage = tuple(np.linspace(0.95, 0.15, 15).tolist())
    return ReportData(
        bundle=HOSTILE,
        arch="resnet32",
        stages=STAGES,
        policy="learned",
        policy_network="decides",
        input_source=f"pictures in {HOSTILE}",
        is_real_input=True,
        n_images=200,
        accuracy=0.9125,
        tuned_for=HOSTILE,
        blocks_mean=7.5,
        blocks_std=1.25,
        flops_mean=7.0e7,
        flops_std=1.1e7,
        full_flops=137_700_000,
        unique_policies=42,
        common_bits=None,
        boundary="pixels to logits",
        n_timed_images=200,
        strategies=(_latency("full", full, full), _latency("chain", chain, full)),
        line=fit_line(chain, full.median_ms),
        points=(
            _point("this policy: learned", 0.9125, 7.5, 7e7, threshold=0.5),
            _point("all", 0.93, 15, 1.377e8),
            _point("learned:0.9", 0.89, 5.2, 5.5e7, threshold=0.9),
        ),
        paper_points=CIFAR10_POINTS,
        usage=usage,
        classes=(_class_figures("cat", usage), _class_figures(HOSTILE, usage[::-1])),
        parts=(_part("stem", "stem", 1.0), _part("block_00", "block", 0.95), _part("head", "head", 1.0)),
        warnings=("the machine is busy",),
        environment={"cpu": "a made-up processor", "threads": "1"},
        commands=("bdtool report 'my bundle' --data test.npz -o report.html",),
    )


@pytest.fixture(scope="session")
def fixed(varied: ReportData) -> ReportData:
    """Every image runs the same seven blocks."""
    full, chain = (_samples(seed=seed, varies=False) for seed in (1, 2))
    bits = "101010101010100"
    usage = tuple(float(bit) for bit in bits)
    same = {"blocks_std": 0.0, "n_policies": 1, "usage": usage, "dominant": (), "easiest": (), "hardest": ()}
    return dataclasses.replace(
        varied,
        policy=bits,
        blocks_std=0.0,
        unique_policies=1,
        common_bits=bits,
        strategies=(_latency("full", full, full), _latency("chain", chain, full)),
        line=None,
        usage=usage,
        classes=tuple(dataclasses.replace(one, **same) for one in varied.classes),
    )


@pytest.fixture(scope="session")
def unlabelled(varied: ReportData) -> ReportData:
    return dataclasses.replace(varied, accuracy=None, points=(), paper_points=(), classes=())


@pytest.fixture(scope="session")
def by_name(varied: ReportData, fixed: ReportData, unlabelled: ReportData) -> Callable[[str], ReportData]:
    return {"varied": varied, "fixed": fixed, "unlabelled": unlabelled}.__getitem__


def _samples(*, seed: int, varies: bool) -> Samples:
    draw = np.random.default_rng(seed)
    blocks = draw.integers(3, 13, 400).astype(float) if varies else np.full(400, 7.0)
    latency_ms = 0.2 + 0.1 * blocks + draw.gamma(2.0, 0.01, 400)
    return Samples(latency_ms=latency_ms, blocks_run=blocks, flops=blocks * 9e6, batch=1)


def _latency(name: str, samples: Samples, full: Samples) -> StrategyLatency:
    return StrategyLatency(
        name=name,
        latency_ms=tuple(samples.latency_ms.tolist()),
        blocks_run=tuple(samples.blocks_run.tolist()),
        summary_ms=samples.summary((90, 95, 99)),
        ratio_to_full=samples.ratio_to(full),
        variation=samples.variation,
    )


def _point(
    name: str, accuracy: float, blocks_mean: float, flops_mean: float, *, threshold: float | None = None
) -> OperatingPoint:
    return OperatingPoint(
        name=name,
        accuracy=accuracy,
        blocks_mean=blocks_mean,
        flops_mean=flops_mean,
        threshold=threshold,
    )


def _part(name: str, kind: str, usage: float) -> PartCost:
    return PartCost(name=name, kind=kind, mean_ms=0.05, flops=500_000, usage=usage, share=usage / 3)


def _class_figures(label: str, usage: tuple[float, ...]) -> ClassFigures:
    pictures = tuple(
        Picture(
            uri=uri_from_pixels(pixels), name=f"{HOSTILE}[{i}]", predicted=label, is_correct=i > 0, blocks_run=5 + i
        )
        for i, pixels in enumerate(synthetic_images(3, height=32, width=32))
    )
    return ClassFigures(
        label=label,
        n_images=100,
        accuracy=0.9,
        blocks_mean=7.5,
        blocks_std=1.25,
        n_policies=20,
        line_ms=0.9,
        usage=usage,
        dominant=(PolicyUse(bits="110110110110000", n_images=30, share=0.3, pictures=pictures),),
        easiest=pictures,
        hardest=pictures[::-1],
    )

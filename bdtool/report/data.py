"""What a report shows, as plain data: `gather` fills it, `charts` and `page` read it; `asdict` makes JSON of it."""

from __future__ import annotations

from dataclasses import dataclass

from bdtool.profiling.line import BlocksLine
from bdtool.profiling.workload import heads_page


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of the data set, small enough to travel inside the page."""

    uri: str  # data:image/...
    name: str
    predicted: str
    is_correct: bool
    blocks_run: int


@dataclass(frozen=True, kw_only=True)
class PolicyUse:
    """One policy vector and the images of a class that it was chosen for."""

    bits: str  # one 0 or 1 for each block
    n_images: int
    share: float  # of the class's images
    pictures: tuple[Picture, ...]

    @property
    def blocks_run(self) -> int:
        return self.bits.count("1")


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """The images whose label is this class."""

    label: str
    n_images: int
    accuracy: float
    blocks_mean: float
    blocks_std: float
    n_policies: int
    line_ms: float | None  # what the latency line gives for `blocks_mean`; None where there is no line
    usage: tuple[float, ...]  # share of the class's images that keep each block
    dominant: tuple[PolicyUse, ...]  # the most frequent first; empty where no two images share a policy
    easiest: tuple[Picture, ...]  # fewest blocks first; empty where all ran equally many
    hardest: tuple[Picture, ...]  # most blocks first


@dataclass(frozen=True, kw_only=True)
class StrategyLatency:
    """Latency of one strategy, one request of one image each, measured in turns with the others."""

    name: str
    latency_ms: tuple[float, ...]
    blocks_run: tuple[float, ...]
    summary_ms: dict[str, float | None]  # min, mean, median, percentiles, max; see `Samples.summary`
    ratio_to_full: float  # median over rounds of the ratio of their means
    variation: float | None  # coefficient of variation of equal work

    @property
    def median_ms(self) -> float:
        median = self.summary_ms["median"]
        assert median is not None  # unlike percentiles, which too few requests do not hold
        return median


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """One policy's accuracy and cost, of this bundle or as the paper prints it (`source` then says where)."""

    name: str
    accuracy: float
    blocks_mean: float
    flops_mean: float | None  # None where the source prints none
    source: str = "measured here"
    threshold: float | None = None  # of the policy network, where it decides


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """One part of the network: what a call costs and how often it is called."""

    name: str
    kind: str
    mean_ms: float | None  # None: it did not run among the timed requests
    flops: int
    usage: float  # share of all images that run it
    share: float | None  # of all engine time of the timed requests


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page. `accuracy`, `points` and `classes` need labels: without them None and empty."""

    bundle: str
    arch: str
    stages: tuple[int, ...]
    policy: str
    policy_network: str
    input_source: str
    is_real_input: bool
    n_images: int
    accuracy: float | None
    tuned_for: str | None  # the policy that the base was fine-tuned for
    blocks_mean: float
    blocks_std: float
    flops_mean: float
    flops_std: float
    full_flops: int
    unique_policies: int
    common_bits: str | None  # the policy vector, where all images share one
    boundary: str
    n_timed_images: int
    strategies: tuple[StrategyLatency, ...]
    line: BlocksLine | None  # None where images run equally, or nearly equally many blocks
    points: tuple[OperatingPoint, ...]  # the policy's own is the first
    paper_points: tuple[OperatingPoint, ...]
    usage: tuple[float, ...]  # share of images that keep each block
    classes: tuple[ClassFigures, ...]
    parts: tuple[PartCost, ...]
    warnings: tuple[str, ...]
    environment: dict[str, str]
    commands: tuple[str, ...]

    @property
    def n_blocks(self) -> int:
        return sum(self.stages)

    @property
    def full(self) -> StrategyLatency:
        return next(strategy for strategy in self.strategies if strategy.name == "full")

    @property
    def dynamic(self) -> StrategyLatency:
        """The strategy of the headline: the first that is neither a static network nor in another precision."""
        return next((strategy for strategy in self.strategies if heads_page(strategy.name)), self.full)

    @property
    def replaces_policy_network(self) -> bool:
        """Whether a policy network runs whose bits the POLICY replaces: latencies hold its cost, FLOPs do not."""
        return self.policy.partition(":")[0] != "learned" and any(part.kind == "policy" for part in self.parts)

    @property
    def has_equal_policies(self) -> bool:
        return self.common_bits is not None

    @property
    def has_equal_cost(self) -> bool:
        """Whether every image ran equally many blocks, though maybe not the same ones."""
        return self.blocks_std == 0

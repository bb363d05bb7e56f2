"""What is measured for a report, on the smallest real bundle."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bdtool.cli import main
from bdtool.data.sources import open_data
from bdtool.data.synthetic import synthetic_images
from bdtool.evaluation import evaluate
from bdtool.profiling.line import fit_line
from bdtool.profiling.profile import profile
from bdtool.profiling.result import Profile
from bdtool.profiling.statistics import Samples
from bdtool.profiling.workload import Settings
from bdtool.report.data import ReportData
from bdtool.report.gather import gather_report
from bdtool.report.paper import CIFAR10_POINTS, paper_points
from bdtool.report.request import ReportRequest
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from export.bundle import Bundle

N_IMAGES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x=synthetic_images(N_IMAGES, height=32, width=32), y=np.arange(N_IMAGES) % 3)
    return path


def profiled(bundle: Bundle, source: Any, policy: str | None) -> Profile:
    settings = Settings(duration_s=0.01, warmup_ms=0)
    return profile(bundle, source, policy=policy, strategies=["chain"], settings=settings, place=Place())


@pytest.fixture(scope="module")
def gathered(tiny: Any, data: Path) -> Callable[[str | None], ReportData]:
    def gather(policy: str | None) -> ReportData:
        bundle = Bundle.open(tiny.bundle)
        source = open_data(str(data), network=bundle.network)
        output = Path("report.html")
        request = ReportRequest(
            made_by="bdtool report", bundle=tiny.bundle, data=str(data), output=output, policy=policy
        )
        return gather_report(profiled(bundle, source, policy), bundle, source, request)

    return gather


@pytest.fixture(scope="module")
def learned(gathered: Callable[[str | None], ReportData]) -> ReportData:
    return gathered(None)


def test_the_figures_are_those_of_evaluate(learned: ReportData, tiny: Any, data: Path) -> None:
    with Orchestrator.open(tiny.bundle) as runtime:
        expected = evaluate(runtime, open_data(str(data), network=runtime.network))
    for name in ("n_images", "accuracy", "blocks_mean", "blocks_std", "flops_mean", "flops_std", "unique_policies"):
        assert getattr(learned, name) == pytest.approx(getattr(expected, name)), name


def test_classes_and_blocks_add_up(learned: ReportData) -> None:
    assert sum(one.n_images for one in learned.classes) == N_IMAGES
    assert sum(learned.usage) == pytest.approx(learned.blocks_mean)
    usage = np.average(
        [one.usage for one in learned.classes], axis=0, weights=[one.n_images for one in learned.classes]
    )
    assert usage == pytest.approx(learned.usage)
    by_name = {part.name: part.usage for part in learned.parts}
    assert by_name["block_01"] + by_name["shortcut_01"] == pytest.approx(1)


def test_latency_of_a_class_is_what_the_line_gives_for_its_blocks(tiny: Any, data: Path) -> None:
    """Not what a pass in the order of the data took: there, a machine that slows down slows the later classes."""
    report = _report_of_images_that_ran([1.0, 2.0, 3.0], tiny, data)
    assert len({one.blocks_mean for one in report.classes}) > 1
    for one in report.classes:
        assert one.line_ms == pytest.approx(0.5 + 0.25 * one.blocks_mean)


def test_requests_of_nearly_equal_work_give_no_line(tiny: Any, data: Path) -> None:
    """As in the profile, whose line then goes through extra points: drawn out to `full` it would be noise."""
    assert _report_of_images_that_ran([1.0, 1.25, 1.5], tiny, data).line is None


def _report_of_images_that_ran(blocks: list[float], tiny: Any, data: Path) -> ReportData:
    """Return the report of a profile of 120 images that took 0.5 ms and 0.25 ms for each block."""
    bundle = Bundle.open(tiny.bundle)
    source = open_data(str(data), network=bundle.network)
    profile = profiled(bundle, source, None)
    ran = np.tile(blocks, 120 // len(blocks))
    chain = Samples(latency_ms=0.5 + 0.25 * ran, blocks_run=ran, flops=ran, batch=1)
    profile = dataclasses.replace(profile, samples={**profile.samples, "chain": chain})
    request = ReportRequest(made_by="bdtool report", bundle=tiny.bundle, data=str(data), output=Path("report.html"))
    return gather_report(profile, bundle, source, request)


def test_easiest_and_hardest_are_in_order(learned: ReportData) -> None:
    for one in learned.classes:
        easy, hard = ([picture.blocks_run for picture in side] for side in (one.easiest, one.hardest))
        assert easy == sorted(easy)
        assert hard == sorted(hard, reverse=True)
        assert not easy or easy[0] < hard[0]


def test_the_dominant_policies_are_the_most_frequent(learned: ReportData) -> None:
    shown = [one for one in learned.classes if one.dominant]
    assert shown
    for one in shown:
        counts = [use.n_images for use in one.dominant]
        assert counts == sorted(counts, reverse=True)
        assert sum(counts) <= one.n_images
        assert {len(use.bits) for use in one.dominant} == {learned.n_blocks}


def test_heuristics_keep_as_many_blocks_as_the_policy(learned: ReportData) -> None:
    count = round(learned.blocks_mean)
    names = [point.name for point in learned.points]
    heuristics = ["all", f"distribute:{count}", f"random:{count}", f"first:{count}"]
    assert names == ["this policy: learned", *heuristics, "learned:0.3", "learned:0.7", "learned:0.9"]


def test_other_thresholds_are_those_of_evaluate(
    gathered: Callable[[str | None], ReportData], tiny: Any, data: Path
) -> None:
    report = gathered("learned:0.7")
    with Orchestrator.open(tiny.bundle, threshold=0.3) as runtime:
        expected = evaluate(runtime, open_data(str(data), network=runtime.network))
    points = {point.name: point for point in report.points}
    assert [name for name in points if "learned" in name] == ["this policy: learned:0.7", "learned:0.3", "learned:0.9"]
    found = points["learned:0.3"]
    assert (found.accuracy, found.blocks_mean) == (expected.accuracy, expected.blocks_mean)
    assert [point.threshold for point in report.points if point.threshold is not None] == [0.7, 0.3, 0.9]


def test_a_fixed_policy_is_recognised(gathered: Callable[[str | None], ReportData]) -> None:
    report = gathered("distribute:2")
    assert report.common_bits == "110"
    assert report.line is None
    assert all(one.line_ms is None for one in report.classes)
    assert all(not one.easiest for one in report.classes)
    assert [point.name for point in report.points].count("distribute:2") == 0


def test_commands_repeat_the_request() -> None:
    typed = "bdtool report 'my bundle' --data test.npz"
    given = {"bundle": Path("my bundle"), "data": "test.npz", "output": Path("r.html"), "policy": "first:2", "limit": 9}
    report, evaluated, profiled = ReportRequest(made_by=typed, **given).commands(has_labels=True)
    assert report == typed
    assert evaluated.startswith("bdtool evaluate 'my bundle' --data test.npz --policy first:2 ")
    assert evaluated.endswith("--limit 9")
    assert profiled.startswith("bdtool profile 'my bundle' ")
    by_profile = ReportRequest(made_by="bdtool profile B --html P", by_profile=True, **given)
    assert by_profile.commands(has_labels=True) == ("bdtool profile B --html P", evaluated)


def test_a_page_without_labels_names_no_command_that_needs_them(tiny: Any) -> None:
    bundle = Bundle.open(tiny.bundle)
    source = open_data("synthetic:4", network=bundle.network, labels="optional")
    settings = Settings(duration_s=0.01, warmup_ms=0)
    profiled = profile(bundle, source, policy=None, strategies=["chain"], settings=settings, place=Place())
    request = ReportRequest(made_by="bdtool report", bundle=tiny.bundle, data="synthetic:4", output=Path("r.html"))
    commands = gather_report(profiled, bundle, source, request).commands
    assert [command.split()[1] for command in commands] == ["report", "profile"]


def test_the_line_is_found_despite_slow_requests() -> None:
    blocks = np.repeat(np.arange(2.0, 10), 30)
    latency_ms = 0.5 + 0.25 * blocks
    latency_ms[::10] *= 20
    samples = Samples(latency_ms=latency_ms, blocks_run=blocks, flops=blocks, batch=1)
    line = fit_line(samples, full_ms=2.0)
    assert line is not None
    assert (line.fixed_ms, line.per_block_ms) == pytest.approx((0.5, 0.25))
    assert line.break_even_blocks == pytest.approx(6)


def test_a_profile_of_batches_is_refused(tiny: Any, data: Path) -> None:
    bundle = Bundle.open(tiny.bundle)
    source = open_data(str(data), network=bundle.network).drawn(4)
    settings = Settings(batch=2, duration_s=0.01, warmup_ms=0)
    batches = profile(bundle, source, policy=None, strategies=[], settings=settings, place=Place())
    request = ReportRequest(made_by="bdtool report", bundle=tiny.bundle, data=str(data), output=Path("r.html"))
    with pytest.raises(ValueError, match="got a profile of batch 2"):
        gather_report(batches, bundle, source, request)


def test_paper_points_are_shown_for_their_data_set_only(tiny: Any) -> None:
    network = Bundle.open(tiny.bundle).network
    ten = dataclasses.replace(network, n_classes=10, labels=None)
    assert paper_points(ten) == CIFAR10_POINTS
    assert paper_points(dataclasses.replace(ten, labels=tuple("0123456789"))) == ()


def test_the_command_writes_a_page(tiny: Any, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    words = ["report", tiny.bundle, "--data", data, "-o", output, "--limit", 8, "--duration", 0.01]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "8 images, policy learned" in result.output
    assert output.read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_the_command_says_what_to_install(
    tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    words = ["report", tiny.bundle, "--data", data, "-o", tmp_path / "report.html"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 2
    assert 'add it with: pip install "Jinja2>=3.1" "plotly>=6.0"' in result.output

"""`bdtool profile` by its JSON keys, its recommendation, and what `--strategy auto` makes of it."""

import html
import json
import re
import shlex
import shutil

import pytest

from bdtool import Orchestrator
from bdtool.data.synthetic import synthetic_images
from bdtool.errors import BundleError, UsageError
from bdtool.runtime.factory import strategies_for
from bdtool.runtime.masks import MaskCount, write_masks
from bdtool.runtime.recommendation import CANDIDATES, FILE

QUICK = ("--duration", "0.02", "--warmup", "0")


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """A copy of `tiny` with engines, which the tests of this module only add to."""
    from click.testing import CliRunner

    from bdtool.cli import main

    bundle = shutil.copytree(
        tiny.bundle, tmp_path_factory.mktemp("built") / "bundle", ignore=shutil.ignore_patterns("engines")
    )
    assert CliRunner().invoke(main, ["build", str(bundle)]).exit_code == 0
    return bundle


@pytest.fixture
def fresh(built, tmp_path):
    """A copy with engines that a test may change."""
    return shutil.copytree(built, tmp_path / "bundle")


def _engines(bundle):
    [directory] = (bundle / "engines").iterdir()
    return directory


def test_path_reports_its_cache_and_every_figure_its_spread(built, bdtool_json, npz):
    result = bdtool_json("profile", built, "--data", npz, "--strategy", "chain,path", *QUICK)
    path = result["strategies"]["path"]
    assert path["hit_rate"] == 1  # every mask of the images was joined before the clock started
    assert 1 <= path["paths"] <= 8
    assert 0 < path["path_bytes"] <= path["path_bytes_bound"]
    assert path["path_masks"] == "counted on the measured images before the clock started"
    assert f"so `path` knew the {path['paths']} masks of the timed images beforehand" in " ".join(result["warnings"])
    assert "hit_rate" not in result["strategies"]["chain"]
    for strategy in result["strategies"].values():
        low, high = strategy["ratio_to_full_iqr"]
        assert 0 < low <= high
        assert len(strategy["median_ms_iqr"]) == 2
    assert result["strategies"]["full"]["ratio_to_full_iqr"] == [1, 1]
    assert result["peak_memory_mib"] > 10
    assert {"cpu_affinity", "threads"} <= set(result["environment"])


def test_split_and_line_of_each_strategy(built, bdtool_json, npz):
    result = bdtool_json(
        "profile", built, "--data", npz, "--strategy", "chain,path", "--policy", "distribute:2", *QUICK
    )
    assert set(result["split"]["strategies"]) == {"full", "chain", "path"}
    assert "a pass of its own" in result["split"]["pass"]
    chain = result["split"]["strategies"]["chain"]["components"]
    assert list(chain) == ["preprocess", "policy", "stem", "blocks", "head", "dispatch"]
    assert {"policy", "one_engine"} <= set(result["split"]["strategies"]["path"]["components"])
    for row in result["split"]["strategies"].values():
        assert sum(part["share"] for part in row["components"].values()) == pytest.approx(1)
        assert sum(part["ms"] for part in row["components"].values()) == pytest.approx(row["total_ms"])
    assert set(result["latency_against_blocks"]) == {"chain", "path"}
    assert "masks of the timed images" not in " ".join(result["warnings"])  # all have the one that was given
    for line in result["latency_against_blocks"].values():
        assert {"fixed_ms", "per_block_ms", "break_even_blocks", "r_squared"} <= set(line)
        assert "extra points" in line["points"]


def test_masks_stored_by_build_are_taken(fresh, bdtool_json, npz):
    write_masks(_engines(fresh), [MaskCount(mask="111", share=1.0)], source="a test", policy="all")
    words = ("profile", fresh, "--data", npz, "--strategy", "path", "--policy", "000", *QUICK)
    path = bdtool_json(*words)["strategies"]["path"]
    assert (path["hit_rate"], path["paths"]) == (0, 1)
    assert "bdtool build --paths" in path["path_masks"]


def test_precisions_are_measured_side_by_side(calibrate, bdtool_json, bundle_copy, npz, monkeypatch):
    calibrate()
    opened, real = [], Orchestrator.open

    def open_noting(bundle, **options):
        opened.append((options["strategy"], options["precision"]))
        return real(bundle, **options)

    monkeypatch.setattr(Orchestrator, "open", open_noting)
    write_masks(_engines(bundle_copy), [MaskCount(mask="111", share=1.0)], source="a test", policy="all")
    names = ["full@int8", "chain", "chain@int8", "path", "path@int8"]
    result = bdtool_json("profile", bundle_copy, "--data", npz, "--strategy", ",".join(names), *QUICK)
    rows = result["strategies"]
    assert list(rows) == ["full", *names]
    expected = [("full", "fp32"), ("full", "int8"), ("chain", "fp32"), ("chain", "int8")]
    assert list(dict.fromkeys(opened)) == [*expected, ("path", "fp32"), ("path", "int8")]
    assert [row["precision"] for row in rows.values()] == ["fp32", "int8", "fp32", "int8", "fp32", "int8"]
    assert rows["path"]["hit_rate"] == 1
    assert rows["path@int8"]["paths"] == 1  # of the mask noted for INT8, whose engines calibrating has built
    assert rows["full@int8"]["blocks_mean"] == 3
    assert set(result["latency_against_blocks"]) == {"chain", "chain@int8", "path", "path@int8"}
    [of_masks] = [text for text in result["warnings"] if "masks of the timed images" in text]
    n_masks = rows["path"]["paths"]
    assert of_masks.startswith(f"no frequent masks are noted for fp32, so `path` knew the {n_masks} masks of")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("auto@int8", "'auto' takes no precision or CUDA graph mode. Give --precision or --cuda-graph, or name"),
        ("chain@fp32@int8", "expected at most one precision and one CUDA graph mode"),
        ("full:resnet20@int8", "unknown strategy 'full:resnet20'"),
        ("chain,chain@fp32", "strategies 'chain' and 'chain@fp32' are the same here; leave one of them out"),
    ],
)
def test_odd_name_of_a_strategy_is_wrong_usage(built, bdtool, strategy, message):
    assert message in bdtool("profile", built, "--strategy", strategy, *QUICK, status=2).stderr


def test_precision_that_is_not_there_is_refused_before_engines_are_built(fresh, bdtool):
    shutil.rmtree(fresh / "engines")
    text = bdtool("profile", fresh, "--strategy", "chain,chain@int8", *QUICK, status=1).stderr
    assert "no int8 parts" in text
    assert not (fresh / "engines").exists()


def test_sweep_measures_each_batch(built, npz, bdtool, tmp_path):
    words = ("profile", built, "--data", npz, "--policy", "random:2", "--strategy", "chain,path", "--sweep", *QUICK)
    table = bdtool(*words, "--json", tmp_path / "profile.json").stdout.partition("Throughput by batch")[2]
    shown = re.findall(r"^ *(?:full|chain|path) +\d+ +([\d.]+) +([\d.]+)", table, re.MULTILINE)
    assert len(shown) == 3 * 4
    for images_per_s, ms in shown:
        assert float(ms) == pytest.approx(1000 / float(images_per_s), abs=0.0006, rel=1e-3)
    sweep = json.loads((tmp_path / "profile.json").read_text())["sweep"]
    assert list(sweep) == ["1", "8", "32", "64"]
    for batch, strategies in sweep.items():
        assert set(strategies) == {"full", "chain", "path"}
        assert [name for name, row in strategies.items() if "hit_rate" in row] == ["path"]
        for row in strategies.values():
            assert row["throughput_ips"] == pytest.approx(int(batch) * 1000 / row["latency_ms"]["mean"])
            assert row["ratio_to_full_iqr"][0] > 0


def test_batches_above_the_bundle_are_left_out_or_refused(shared_traces, tiny, bdtool, npz, tmp_path):
    bdtool("export", tiny.path, "-o", tmp_path / "small", "--max-batch", 8)
    result = bdtool("profile", tmp_path / "small", "--data", npz, "--sweep", *QUICK, "--json", "-")
    assert list(json.loads(result.stdout)["sweep"]) == ["1", "8"]
    assert "batch 32, 64 left out of the sweep: bundle or engines were made with --max-batch 8" in result.stderr
    message = bdtool("profile", tmp_path / "small", "--data", npz, "--batch", 9, *QUICK, status=2).stderr
    assert f"--batch 9: {tmp_path / 'small'} was exported with --max-batch 8, so that a request would run in" in message
    assert "slices of 8. Give --batch 8 or less, or export with --max-batch 9" in message
    message = bdtool(
        "profile", tiny.bundle, "--baseline", tmp_path / "small", "--data", npz, "--batch", 9, *QUICK, status=2
    ).stderr
    assert f"--batch 9: {tmp_path / 'small'} was exported" in message


def test_baseline_of_another_bundle_takes_turns(built, export_random, bdtool_json, npz):
    other = export_random("resnet14", has_policy=False).bundle
    strategies = bdtool_json("profile", built, "--data", npz, "--baseline", other, *QUICK)["strategies"]
    assert list(strategies) == ["full", "chain", "full:resnet14"]
    assert strategies["full:resnet14"]["blocks_mean"] == 6
    assert strategies["full:resnet14"]["flops_ratio_to_full"] > 1


def test_auto_is_recorded_and_used(fresh, bdtool, bdtool_json, npz, picture):
    result = bdtool_json("profile", fresh, "--data", npz, "--strategy", "auto", *QUICK)
    assert set(result["strategies"]) == set(strategies_for("onnxruntime", "cpu"))
    ratios = {name: row["ratio_to_full"] for name, row in result["strategies"].items()}
    recommendation = result["recommendation"]
    assert recommendation["ratios_to_full"] == ratios
    assert recommendation["strategy"] == min(ratios.keys() - {"full"}, key=ratios.__getitem__)
    assert set(recommendation["medians_ms"]) == set(ratios)
    assert recommendation["threads"] == result["environment"]["threads"]
    [recorded] = json.loads((_engines(fresh) / FILE).read_text())["recommendations"]
    assert recorded == recommendation
    with Orchestrator.open(fresh, strategy="auto") as runtime:
        assert runtime.strategy_name == recommendation["strategy"]
    shown = bdtool_json("run", fresh, picture, "--strategy", "auto")["images"]
    assert shown[0]["policy"] == bdtool_json("run", fresh, picture)["images"][0]["policy"]
    assert f"recommended: {CANDIDATES}"[:13] in bdtool("profile", fresh, "--strategy", "auto", *QUICK).stdout


@pytest.mark.parametrize("strategy", sorted(set(CANDIDATES) & set(strategies_for("onnxruntime", "cpu"))))
def test_auto_opens_what_was_recorded(fresh, strategy):
    images = synthetic_images(2, height=32, width=32)
    with Orchestrator.open(fresh) as runtime:
        threads, expected = runtime.threads, runtime.run(images).logits
    entry = {"strategy": strategy, "threads": threads, "batch": 1, "policy": "all", "medians_ms": {}}
    data = {"format_version": 1, "recommendations": [entry | {"input_source": "", "versions": {}}]}
    (_engines(fresh) / FILE).write_text(json.dumps(data))
    with Orchestrator.open(fresh, strategy="auto") as runtime:
        assert runtime.strategy_name == strategy
        assert runtime.run(images).logits == pytest.approx(expected, abs=1e-4)


def test_auto_without_a_record_says_what_to_run(fresh, bdtool, picture):
    with pytest.raises(BundleError, match="--strategy auto"):
        Orchestrator.open(fresh, strategy="auto")
    message = bdtool("run", fresh, picture, "--strategy", "auto", status=1).stderr
    assert f"Run `bdtool profile {fresh} --strategy auto" in message
    (_engines(fresh) / FILE).write_text("{")
    assert "cannot be read as a recommendation" in bdtool("run", fresh, picture, "--strategy", "auto", status=1).stderr


def test_auto_that_cannot_be_recorded_is_a_warning(fresh, bdtool, monkeypatch):
    def denied(directory, recommendation):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bdtool.profiling.recommending.write_recommendation", denied)
    result = bdtool("profile", fresh, "--strategy", "auto", *QUICK)
    assert "warning: the recommendation could not be recorded (Permission denied)" in result.stderr
    assert "recommended: " in result.stdout
    assert "it was not recorded" in result.stdout
    assert "now takes it" not in result.stdout


def test_text_shows_every_table(built, bdtool, npz):
    text = bdtool("profile", built, "--data", npz, "--strategy", "chain,path", *QUICK).stdout
    for words in (
        "CPU affinity",
        "clock: uint8 images in host memory",
        "median over rounds of the ratio of means",
        "of the images hit",
        "Where the time goes",
        "break-even blocks",
        "Engine calls of chain, batch 1",
        "peak memory",
    ):
        assert words in text


def test_percentiles_that_few_requests_do_not_hold_are_dashes(built, bdtool, npz, tmp_path):
    words = ("profile", built, "--data", npz, "--batch", 25, "--policy", "101", "--duration", "1e-9", "--warmup", "0")
    text = bdtool(*words, "--json", tmp_path / "profile.json").stdout
    chain = json.loads((tmp_path / "profile.json").read_text())["strategies"]["chain"]
    assert chain["n_requests"] == 8
    assert [chain["latency_ms"][name] for name in ("p90", "p95", "p99")] == [None] * 3
    [row] = [line.split() for line in text.splitlines() if line.startswith("chain ")][:1]
    assert row[4:7] == ["-"] * 3
    assert row[-1] == "8"


def test_unknown_strategy_of_run_is_wrong_usage(built, bdtool, picture):
    assert "unknown strategy 'magic'" in bdtool("run", built, picture, "--strategy", "magic", status=2).stderr
    with pytest.raises(UsageError, match="'magic'"):
        Orchestrator.open(built, strategy="magic")


def test_stopped_profile_says_that_no_figures_were_kept(built, bdtool, monkeypatch, tmp_path):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bdtool.profiling.profile.measure", stopped)
    told = bdtool("profile", built, *QUICK, "--json", tmp_path / "profile.json", status=1)
    assert "stopped before the end: no figures were kept; engines that were built are\n" in told.stderr
    assert told.stdout == ""
    assert not (tmp_path / "profile.json").exists()


def test_html_writes_the_report_page(bdtool, bundle_copy, npz, tmp_path, monkeypatch):
    pytest.importorskip("plotly", reason="plotly, the charts of the report, is not installed")
    page = tmp_path / "profile.html"
    words = ("--data", npz, "--duration", "0.05", "--strategy", "full@off,chain", "--html", page)
    monkeypatch.setattr("bdtool.profiling.profile.stability_warnings", lambda samples: ["so it is"])
    told = bdtool("profile", bundle_copy, *words)
    text = page.read_text(encoding="utf-8")
    assert "<!doctype html>" in text.lower()
    assert "with full@off" not in text  # a static network is no strategy to head the page
    assert shlex.join(map(str, ("bdtool", "profile", bundle_copy, *words))) in html.unescape(text)
    assert told.stderr.count("warning: so it is") == 1


def test_html_is_headed_by_the_precision_whose_accuracy_it_shows(calibrate, bdtool, bundle_copy, npz, tmp_path):
    pytest.importorskip("plotly", reason="plotly, the charts of the report, is not installed")
    calibrate()
    page = tmp_path / "profile.html"
    bdtool("profile", bundle_copy, "--data", npz, *QUICK, "--strategy", "chain@int8,chain", "--html", page)
    text = page.read_text(encoding="utf-8")
    assert "with chain, " in text
    assert "with chain@int8, " not in text


def test_html_is_refused_for_batches_before_measuring(bdtool, bundle_copy, tmp_path):
    pytest.importorskip("plotly", reason="plotly, the charts of the report, is not installed")
    words = ["profile", bundle_copy, "--batch", "8", "--html", tmp_path / "profile.html"]
    assert "--batch 1" in bdtool(*words, status=2).output

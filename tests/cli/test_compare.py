"""`bdtool compare` by its exit statuses: 0 no regression, 1 a regression, 2 not two profiles."""

import json

import numpy as np
import pytest

from bdtool.profiling.compare import compare_profiles


def _profile(median, *, threads=1):
    def row(value, ratio):
        return {
            "latency_ms": {"median": value, "p99": 2 * value},
            "median_ms_iqr": [0.99 * value, 1.01 * value],
            "ratio_to_full": ratio,
            "ratio_to_full_iqr": [0.99 * ratio, 1.01 * ratio],
            "blocks_mean": 3.0,
            "throughput_ips": 1000 / value,
        }

    strategies = {"full": row(10.0, 1.0), "chain": row(median, median / 10)}
    return {"strategies": strategies, "environment": {"cpu": "one", "threads": threads}, "batch": 1}


@pytest.fixture
def write(tmp_path):
    def written(name, data):
        (tmp_path / name).write_text(data if isinstance(data, str) else json.dumps(data))
        return tmp_path / name

    return written


def test_no_regression_is_status_0(bdtool, write):
    result = bdtool("compare", write("a.json", _profile(4)), write("b.json", _profile(4.1)))
    assert "no regression (more than 5.0 % slower and beyond the spread)" in result.stdout
    assert "+2.5 %" in result.stdout
    assert result.stderr == ""


def test_regression_is_status_1_and_shown(bdtool, write):
    words = ("compare", write("a.json", _profile(4)), write("b.json", _profile(5)))
    result = bdtool(*words, status=1)
    assert "2 regressions" in result.stdout
    assert "REGRESSION" in result.stdout
    bdtool(*words, "--max-slowdown", "0.3")


def test_json_says_what_changed(bdtool_json, write):
    words = ("compare", write("a.json", _profile(4)), write("b.json", _profile(5)))
    data = bdtool_json(*words, status=1)
    assert (data["ok"], data["comparable"]) == (False, True)
    assert data["strategies"]["chain"]["regressions"] == ["median_ms", "ratio_to_full"]
    assert data["strategies"]["chain"]["median_ms"] == {"a": 4, "b": 5, "change": 0.25}
    assert data["strategies"]["full"]["regressions"] == []
    assert data["files"]["a"].endswith("a.json")


@pytest.mark.parametrize("median", [4, 5])
def test_other_machine_is_a_loud_warning_and_no_verdict(bdtool, write, median):
    result = bdtool("compare", write("a.json", _profile(4)), write("b.json", _profile(median, threads=2)), status=1)
    assert "REGRESSION" not in result.stdout
    assert "warning: NOT COMPARABLE" in result.stderr
    assert "differ in threads" in result.stderr
    assert "What else is different" in result.stdout
    assert "no verdict: the profiles are not comparable (threads)" in result.stdout


def test_strategy_that_vanished_is_a_warning_and_none_in_common_no_verdict(bdtool, bdtool_json, write):
    before, after = _profile(4), _profile(4)
    a = write("a.json", before)
    del after["strategies"]["chain"]
    told = bdtool("compare", a, write("b.json", after))
    assert f"warning: only {a} has chain, which cannot be compared" in told.stderr
    del before["strategies"]["full"]
    words = ("compare", write("a.json", before), write("b.json", after))
    told = bdtool(*words, status=1)
    assert "differ in strategies; their figures answer different questions" in told.stderr
    assert "no verdict: the profiles are not comparable (strategies)" in told.stdout
    found = bdtool_json(*words, status=1)
    assert (found["ok"], found["verdict"], found["comparable"]) == (False, "not comparable", False)


@pytest.mark.parametrize("median", [4, 5])
def test_unstable_run_is_said_and_no_verdict(bdtool, write, median):
    noisy = _profile(median) | {"unstable": ["chain: 0.7 of `full` by means, 0.1 by medians of equal work"]}
    a, b = write("a.json", _profile(4)), write("b.json", noisy)
    result = bdtool("compare", a, b, status=1)
    assert "REGRESSION" not in result.stdout
    assert f"no verdict: unstable run in {b}" in result.stdout
    assert f"UNSTABLE: the ratios of {b} are not to be trusted (chain: 0.7 of `full`" in result.stderr
    assert "profile again when nothing else runs" in result.stderr


def test_foreign_file_is_wrong_usage(bdtool, write, tmp_path):
    good = write("a.json", _profile(4))
    assert "not JSON" in bdtool("compare", good, write("b.json", "{"), status=2).stderr
    assert "b.json: not a profile" in bdtool("compare", good, write("b.json", {"accuracy": 1}), status=2).stderr
    bdtool("compare", good, tmp_path / "absent.json", status=2)
    bdtool("compare", good, good, "--max-slowdown", "nan", status=2)


def test_profiles_are_told_apart_by_what_they_ran(bdtool, tiny, export_random, npz, tmp_path):
    """The same images by another path are the same; others under the same path, and other weights, are not."""
    images = tmp_path / "x.npz"
    images.write_bytes(npz.read_bytes())

    def profiled(name, bundle, data):
        words = ("profile", bundle, "--data", data, "--policy", "101", "--duration", "1e-9", "--warmup", "0")
        bdtool(*words, "--json", tmp_path / name)
        return tmp_path / name

    def differences(a, b):
        files = (json.loads(file.read_text()) | {"unstable": []} for file in (a, b))
        return compare_profiles(*files, max_slowdown=1e9).incomparable

    first = profiled("a.json", tiny.bundle, npz)
    assert differences(first, profiled("b.json", tiny.bundle, images)) == ()
    with np.load(npz) as data:
        np.savez(images, x=255 - data["x"])
    changed = profiled("c.json", tiny.bundle, images)
    assert differences(profiled("b.json", tiny.bundle, npz), changed) == ("images",)
    other = export_random("resnet8", shortcut="average-pool", seed=1).bundle
    assert differences(first, profiled("d.json", other, npz)) == ("weights",)
    shown = bdtool("compare", first, changed, status=1)
    assert "differ in images" in shown.stderr
    assert "sha256 " in shown.stdout


def test_profiles_of_the_command_can_be_compared(bdtool, bdtool_json, tiny, npz, tmp_path):
    words = ("profile", tiny.bundle, "--data", npz, "--duration", "0.02", "--warmup", "0")
    bdtool(*words, "--json", tmp_path / "a.json")
    profiled = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(profiled | {"unstable": []}))  # whatever else runs here now
    data = bdtool_json("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert (data["ok"], data["comparable"], data["differences"]) == (True, True, {})
    assert set(data["strategies"]) == {"full", "chain"}

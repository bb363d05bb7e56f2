"""A regression is beyond the bound and beyond the spread; what makes profiles incomparable is listed."""

import copy
import json
import math

import pytest

from bdtool.errors import UsageError
from bdtool.profiling.compare import compare_profiles, read_profile


def _row(median, ratio, *, width=0.01):
    return {
        "latency_ms": {"median": median, "p99": 2 * median},
        "median_ms_iqr": [median * (1 - width), median * (1 + width)],
        "ratio_to_full": ratio,
        "ratio_to_full_iqr": [ratio * (1 - width), ratio * (1 + width)],
        "blocks_mean": 3.0,
        "throughput_ips": 1000 / median,
    }


def profile_json(median=4.0, full=10.0, *, width=0.01, **others):
    strategies = {"full": _row(full, 1.0, width=width), "chain": _row(median, median / full, width=width)}
    environment = {"cpu": "one", "threads": 1, "bdtool": "1"}
    return {"strategies": strategies, "environment": environment, "batch": 1, "policy": "learned", **others}


def _compare(a, b, bound=0.05):
    return compare_profiles(a, b, max_slowdown=bound)


def test_equal_profiles_have_no_regression():
    result = _compare(profile_json(), profile_json())
    assert result.ok
    assert not result.differences
    assert result.strategies["chain"]["median_ms"].relative == 0


def test_profiles_without_a_common_strategy_have_no_verdict():
    a, b = profile_json(), profile_json()
    del a["strategies"]["full"], b["strategies"]["chain"]
    result = _compare(a, b)
    assert (result.ok, result.verdict, result.incomparable) == (False, "not comparable", ("strategies",))
    assert (result.only_in_a, result.only_in_b) == (("chain",), ("full",))


def test_slower_strategy_is_a_regression_of_both_figures():
    result = _compare(profile_json(4), profile_json(4.4))
    assert result.regressions == {"full": (), "chain": ("median_ms", "ratio_to_full")}
    assert result.strategies["chain"]["median_ms"].relative == pytest.approx(0.1)
    assert not result.ok


def test_faster_is_no_regression():
    assert _compare(profile_json(4), profile_json(1)).ok


def test_bound_is_kept():
    assert _compare(profile_json(4), profile_json(4.4), bound=0.11).ok
    assert not _compare(profile_json(4), profile_json(4.4), bound=0).ok


def test_slowdown_within_the_spread_is_no_regression():
    # quartiles 4 to 4.4 and 3.96 to 4.84 overlap
    assert _compare(profile_json(4, width=0.1), profile_json(4.4, width=0.1)).ok


@pytest.mark.parametrize("spread", [None, [None, 4.2], [4.2, "4.6"], [4.2]])
@pytest.mark.parametrize("side", ["a", "b"])
def test_without_a_spread_the_bound_decides(side, spread):
    profiles = {"a": profile_json(4, width=0.5), "b": profile_json(4.4, width=0.5)}
    assert _compare(**profiles).ok
    for figure in ("median_ms_iqr", "ratio_to_full_iqr"):
        profiles[side]["strategies"]["chain"][figure] = spread
    assert not _compare(**profiles).ok


def test_a_slower_machine_leaves_the_ratio():
    result = _compare(profile_json(4, 10), profile_json(8, 20))
    assert result.regressions == {"full": ("median_ms",), "chain": ("median_ms",)}


def test_of_two_precisions_only_medians_are_judged():
    """The other precision may make `full` faster still, which is no regression of a strategy."""
    fp32, int8 = profile_json(4, 8, precision="fp32"), profile_json(2, 3, precision="int8")
    assert _compare(fp32, int8).ok
    assert _compare(int8, fp32).regressions == {"full": ("median_ms",), "chain": ("median_ms",)}


def test_what_makes_figures_incomparable_is_told_from_versions():
    other = profile_json(8, 20, batch=8)
    other["environment"] |= {"threads": 2, "bdtool": "2"}
    result = _compare(profile_json(), other)
    assert result.differences == {"batch": (1, 8), "threads": (1, 2), "bdtool": ("1", "2")}
    assert result.incomparable == ("batch", "threads")
    assert (result.to_json()["comparable"], result.to_json()["verdict"]) == (False, "not comparable")
    assert (result.ok, result.regressions) == (False, {"full": (), "chain": ()})
    other = profile_json(precision="int8")
    other["environment"]["bdtool"] = "2"
    assert _compare(profile_json(), other).to_json()["comparable"] is True


@pytest.mark.parametrize("name", ["arch", "policy_network", "batch", "boundary", "n_images"])
def test_figures_of_other_settings_are_not_comparable(name):
    result = _compare(profile_json(**{name: 1}), profile_json(**{name: 2}))
    assert (result.differences, result.incomparable) == ({name: (1, 2)}, (name,))


MACHINE = ("cpu", "instruction_set", "processors_available", "cpu_affinity", "threads", "device", "gpu")
VERSIONS = ("backend", "driver", "driver_cuda", "os", "python", "numpy", "bdtool")


@pytest.mark.parametrize("name", [*MACHINE, *VERSIONS])
def test_machines_are_not_comparable_and_versions_are(name):
    a, b = profile_json(), profile_json()
    a["environment"][name], b["environment"][name] = 1, 2
    result = _compare(a, b)
    assert (result.differences, result.incomparable) == ({name: (1, 2)}, (name,) if name in MACHINE else ())


@pytest.mark.parametrize("side", ["a", "b"])
def test_unstable_run_leaves_no_verdict(side):
    profiles = {"a": profile_json(4), "b": profile_json(5)}
    profiles[side]["unstable"] = ["chain: noisy"]
    result = _compare(**profiles)
    assert (result.ok, result.has_verdict, result.incomparable) == (False, False, ())
    assert result.unstable == {side: ("chain: noisy",)}
    assert result.regressions == {"full": (), "chain": ()}
    assert result.strategies["chain"]["median_ms"].relative == 0.25
    assert (result.to_json()["stable"], result.to_json()["comparable"]) == (False, True)
    assert result.to_json()["verdict"] == "unstable"


def test_stable_runs_have_a_verdict():
    slower = _compare(profile_json(4, unstable=[]), profile_json(5, unstable=[]))
    assert (slower.ok, slower.to_json()["verdict"]) == (False, "regression")
    equal = _compare(profile_json(4, unstable=[]), profile_json(4))
    assert (equal.ok, equal.to_json()["verdict"]) == (True, "no regression")


def test_json_has_both_figures_and_what_changed():
    a, b = profile_json(4.0), profile_json(5.0)
    b["environment"]["bdtool"] = "2"
    b["strategies"]["path"] = b["strategies"]["chain"]
    a["strategies"]["chain"]["blocks_mean"] = 0.0
    del b["strategies"]["full"]["latency_ms"]["p99"]
    found = _compare(a, b).to_json()
    strategies = found.pop("strategies")
    assert found == {
        "ok": False,
        "verdict": "regression",
        "comparable": True,
        "stable": True,
        "unstable": {},
        "max_slowdown": 0.05,
        "differences": {"bdtool": {"a": "1", "b": "2"}},
        "only_in_a": [],
        "only_in_b": ["path"],
    }
    assert strategies["chain"] == {
        "median_ms": {"a": 4, "b": 5, "change": 0.25},
        "p99_ms": {"a": 8, "b": 10, "change": 0.25},
        "ratio_to_full": {"a": 0.4, "b": 0.5, "change": 0.25},
        "blocks_mean": {"a": 0, "b": 3, "change": None},
        "throughput_ips": {"a": 250, "b": 200, "change": pytest.approx(-0.2)},
        "regressions": ["median_ms", "ratio_to_full"],
    }
    assert strategies["full"]["p99_ms"] == {"a": 20, "b": None, "change": None}


SAME = {"images_sha256": "1" * 64, "weights_sha256": "2" * 64, "keep_sha256": "3" * 64}


def test_same_contents_by_other_names_are_comparable():
    a = profile_json(input_source="./small.npz", policy="masks.npy", **SAME)
    b = profile_json(input_source="/data/small.npz", policy="old/masks.npy", **SAME)
    result = _compare(a, b)
    assert result.ok
    assert set(result.differences) == {"input_source", "policy"}


@pytest.mark.parametrize(
    ("key", "name"), [("images_sha256", "images"), ("weights_sha256", "weights"), ("keep_sha256", "keep_bits")]
)
def test_other_contents_under_one_name_are_not_comparable(key, name):
    names = {"input_source": "small.npz", "policy": "masks.npy"}
    result = _compare(profile_json(**names, **SAME), profile_json(**names, **(SAME | {key: "4" * 64})))
    assert (result.ok, result.incomparable) == (False, (name,))


def test_given_bits_are_not_those_of_the_policy_network():
    learned = SAME | {"keep_sha256": None}
    result = _compare(profile_json(**learned), profile_json(**SAME))
    assert result.differences == {"keep_bits": ("learned", "3" * 64)}


def test_profiles_without_digests_are_compared_by_names():
    assert _compare(profile_json(input_source="a"), profile_json(input_source="a")).ok
    assert _compare(profile_json(input_source="a"), profile_json(input_source="b")).incomparable == ("images",)
    assert _compare(profile_json(policy="all"), profile_json()).incomparable == ("keep_bits",)


def test_another_gpu_is_another_machine_and_another_driver_a_version():
    a, b = profile_json(), profile_json()
    a["environment"] |= {"gpu": "NVIDIA H100", "driver": "580.1"}
    b["environment"] |= {"gpu": "NVIDIA L4", "driver": "580.2"}
    result = _compare(a, b)
    assert result.differences == {"gpu": ("NVIDIA H100", "NVIDIA L4"), "driver": ("580.1", "580.2")}
    assert result.incomparable == ("gpu",)


def test_strategies_of_one_side_are_named():
    b = profile_json()
    b["strategies"]["path"] = b["strategies"].pop("chain")
    result = _compare(profile_json(), b)
    assert (result.only_in_a, result.only_in_b) == (("chain",), ("path",))
    assert list(result.strategies) == ["full"]


def test_missing_percentile_is_no_figure():
    a = profile_json()
    del a["strategies"]["chain"]["latency_ms"]["p99"]
    change = _compare(a, profile_json()).strategies["chain"]["p99_ms"]
    assert (change.a, change.relative) == (None, None)


def test_percentile_that_few_requests_do_not_hold_is_no_figure():
    a = profile_json()
    a["strategies"]["chain"]["latency_ms"]["p99"] = None
    change = _compare(a, profile_json()).strategies["chain"]["p99_ms"]
    assert (change.a, change.relative) == (None, None)


def _with(path, value):
    data = copy.deepcopy(profile_json())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        pytest.param("[" * 200_000, "not JSON", id="nested"),
        ("\xff", "not JSON"),
        ("[]", "it holds a list"),
        ("{}", "no object 'strategies'"),
        ('{"strategies": {}, "environment": {}}', "no strategies"),
        (_with(["strategies", "chain"], 3), "strategy 'chain' has no positive number"),
        (_with(["strategies", "chain", "latency_ms"], None), "latency_ms.median"),
        (_with(["strategies", "chain", "ratio_to_full"], "0.5"), "ratio_to_full"),
        (_with(["strategies", "chain", "ratio_to_full"], math.nan), "ratio_to_full"),
        (_with(["strategies", "chain", "ratio_to_full"], 0), "ratio_to_full"),
        (_with(["environment"], []), "no object 'environment'"),
        (_with(["unstable"], True), "'unstable' is True, expected a list of reasons"),
    ],
)
def test_foreign_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=message) as caught:
        read_profile(tmp_path / "a.json")
    assert "a.json" in str(caught.value)
    assert "bdtool profile --json" in str(caught.value)


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        read_profile(tmp_path)

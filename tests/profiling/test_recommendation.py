"""What `--strategy auto` recommends is recorded for its threads and batch, read again, and refused when damaged."""

import json

import pytest

from bdtool.errors import BundleError
from bdtool.runtime.recommendation import (
    CANDIDATES,
    FILE,
    Recommendation,
    choose_strategy,
    read_recommendation,
    write_recommendation,
)


def _recommendation(strategy="path", threads=1, **others):
    values = {
        "batch": 1,
        "policy": "learned",
        "medians_ms": {"full": 4.0, "chain": 2.0, "path": 1.0},
        "input_source": "a file",
        "versions": {"bdtool": "0"},
    }
    return Recommendation(strategy=strategy, threads=threads, **(values | others))


def _read(directory, threads=1):
    return read_recommendation(directory, threads=threads, bundle=directory)


def test_lowest_ratio_of_those_that_take_a_policy_wins():
    assert choose_strategy({"full": 1, "chain": 4, "path": 3, "full:resnet32": 0.5}) == "path"
    assert choose_strategy({"full": 1, "chain": 3, "path": 3}) == "chain"
    assert "full" not in CANDIDATES


def test_each_number_of_threads_has_its_own(tmp_path):
    write_recommendation(tmp_path, _recommendation("path", 2))
    write_recommendation(tmp_path, _recommendation("chain", 1))
    assert (_read(tmp_path, 1).strategy, _read(tmp_path, 2).strategy) == ("chain", "path")
    write_recommendation(tmp_path, _recommendation("chain", 2))
    assert _read(tmp_path, 2) == _recommendation("chain", 2)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_directory_is_made_where_the_engines_are_those_of_several_targets(tmp_path):
    directory = tmp_path / "engines" / "tensorrt-rtx-1.7.1-sm89-fp32"
    write_recommendation(directory, _recommendation("chain", 1))
    assert _read(directory, 1).strategy == "chain"


@pytest.mark.parametrize("order", [(1, 64), (64, 1)])
def test_batch_of_one_is_read_whichever_was_measured_last(tmp_path, order):
    for batch in order:
        write_recommendation(tmp_path, _recommendation("path" if batch == 1 else "chain", batch=batch))
    assert _read(tmp_path) == _recommendation("path", batch=1)
    write_recommendation(tmp_path, _recommendation("fused", batch=64))
    assert _read(tmp_path).strategy == "path"
    write_recommendation(tmp_path, _recommendation("fused", batch=1))
    assert _read(tmp_path).strategy == "fused"


def test_smallest_batch_is_read_where_batch_one_was_not_measured(tmp_path):
    write_recommendation(tmp_path, _recommendation("chain", batch=64))
    write_recommendation(tmp_path, _recommendation("path", batch=8))
    write_recommendation(tmp_path, _recommendation("fused", threads=2))
    assert _read(tmp_path) == _recommendation("path", batch=8)


def test_none_recorded_says_what_to_run(tmp_path):
    with pytest.raises(BundleError, match=r"no recommendation for .*`bdtool profile .* --strategy auto --threads 1`"):
        _read(tmp_path)


def test_other_number_of_threads_is_refused(tmp_path):
    write_recommendation(tmp_path, _recommendation(threads=2))
    with pytest.raises(BundleError, match=r"for 1 thread, only for 2\. Run `bdtool profile"):
        _read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        pytest.param("[" * 200_000, id="nested"),
        "[]",
        "null",
        '{"format_version": 2, "recommendations": []}',
        '{"format_version": 1}',
        '{"format_version": 1, "recommendations": [{"strategy": "path"}]}',
        '{"format_version": 1, "recommendations": [3]}',
    ],
)
def test_damaged_file_is_refused_and_replaced(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(BundleError, match=r"cannot be read as a recommendation .* --strategy auto"):
        _read(tmp_path)
    write_recommendation(tmp_path, _recommendation())
    assert _read(tmp_path).strategy == "path"


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "full"},
        {"strategy": "magic"},
        {"strategy": None},
        {"threads": "1"},
        {"batch": 0},
        {"medians_ms": [1]},
        {"ratios_to_full": {"path": "low"}},
        {"ratios_to_full": {"path": float("inf")}},
    ],
)
def test_recorded_nonsense_is_refused(tmp_path, wrong):
    write_recommendation(tmp_path, _recommendation())
    data = json.loads((tmp_path / FILE).read_text())
    data["recommendations"][0] |= wrong
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="cannot be read as a recommendation"):
        _read(tmp_path)

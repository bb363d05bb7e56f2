"""A profile recommends the strategy of the lowest mean; an unstable one replaces no record."""

import numpy as np
import pytest

from bdtool.profiling.recommending import recommend, record
from bdtool.profiling.statistics import Samples
from bdtool.runtime.recommendation import FILE, read_recommendations

ENVIRONMENT = {"threads": 1, "bdtool": "1", "backend": "one", "numpy": "2", "python": "3", "cpu": "a"}


def _samples(latency_ms):
    ones = np.ones(len(latency_ms))
    return Samples(latency_ms=np.array(latency_ms, dtype=np.float64), blocks_run=ones, flops=ones, batch=1)


def _recommendation(**means_ms):
    samples = {name: _samples([ms]) for name, ms in ({"full": 10} | means_ms).items()}
    return _of(samples)


def _of(samples):
    return recommend(samples, batch=1, policy="learned", input_source="a file", environment=ENVIRONMENT)


def test_mean_decides_where_the_median_misleads():
    found = _of({"full": _samples([10] * 5), "chain": _samples([1, 1, 1, 20, 20]), "path": _samples([4] * 5)})
    assert found.strategy == "path"
    assert found.ratios_to_full == {"full": 1, "chain": pytest.approx(0.86), "path": pytest.approx(0.4)}
    assert found.medians_ms == {"full": 10, "chain": 1, "path": 4}


def test_record_says_what_was_measured_on_what():
    found = _recommendation(chain=4)
    assert found.versions == {"bdtool": "1", "backend": "one", "numpy": "2", "python": "3", "cpu": "a"}
    assert (found.threads, found.batch, found.policy, found.input_source) == (1, 1, "learned", "a file")


def test_stable_run_replaces_what_was_recorded(tmp_path):
    assert record(_recommendation(chain=4), tmp_path, bundle=tmp_path, is_stable=True) == (True, [])
    assert record(_recommendation(path=4), tmp_path, bundle=tmp_path, is_stable=True) == (True, [])
    assert [entry.strategy for entry in read_recommendations(tmp_path)] == ["path"]


def test_unstable_run_leaves_an_earlier_record(tmp_path):
    record(_recommendation(chain=4), tmp_path, bundle=tmp_path, is_stable=True)
    is_recorded, [warning] = record(_recommendation(path=4), tmp_path, bundle=tmp_path, is_stable=False)
    assert not is_recorded
    assert warning == "the run is unstable: strategy 'auto' keeps the recommendation of an earlier one"
    assert [entry.strategy for entry in read_recommendations(tmp_path)] == ["chain"]


@pytest.mark.parametrize("damaged", [False, True])
def test_unstable_run_is_recorded_where_nothing_was_and_says_so(tmp_path, damaged):
    if damaged:
        (tmp_path / FILE).write_text("{")
    is_recorded, [warning] = record(_recommendation(path=4), tmp_path, bundle=tmp_path, is_stable=False)
    assert is_recorded
    assert "from an unstable run, recorded because there was none. Profile again" in warning
    assert [entry.strategy for entry in read_recommendations(tmp_path)] == ["path"]


def test_all_slower_than_full_is_a_warning(tmp_path):
    _, [warning] = record(_recommendation(chain=12, path=11), tmp_path, bundle=tmp_path, is_stable=True)
    assert warning == "none of chain, path is faster than `full` here; `auto` takes the fastest of them"


def test_records_of_medians_alone_are_read(tmp_path):
    record(_recommendation(chain=4), tmp_path, bundle=tmp_path, is_stable=True)
    content = (tmp_path / FILE).read_text()
    before, _, after = content.partition('"ratios_to_full"')
    (tmp_path / FILE).write_text(before.rstrip().rstrip(",") + after[after.index("}") + 1 :])
    [entry] = read_recommendations(tmp_path)
    assert (entry.strategy, entry.ratios_to_full) == ("chain", {})

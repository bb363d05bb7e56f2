"""`bdtool calibrate --precision mixed`: chosen on some images, judged on others, timed in turns."""

import json

import numpy as np
import pytest

from bdtool.calibrating.judged_images import halves
from bdtool.data.sources import open_data
from export.bundle import Bundle


def test_mixed_precision_writes_its_table(calibrate, bundle_copy, bdtool_json, labelled):
    found = calibrate("--precision", "mixed", "--eval-limit", 10)
    assert found["ok"] is True
    assert (found["gates"]["n_images"], found["chosen_on"]["n_images"]) == (5, 5)
    table = json.loads((bundle_copy / "calibration" / "mixed.json").read_bytes())
    assert table["input_source"] == found["chosen_on"]["input_source"]
    assert table["input_source"].endswith(", without the 5 of the gates")
    assert [row["block"] for row in table["blocks"]] == ["block_00", "block_01", "block_02"]
    for row in table["blocks"]:
        assert row["logits_error"] > 0 < row["fp32_ms"]
        assert row["ratio_to_fp32_iqr"][0] <= row["ratio_to_fp32"] <= row["ratio_to_fp32_iqr"][1]
        assert (row["block"] in found["not_faster"]) == (not row["is_faster"])
    assert [row["policy_flips"] for row in table["blocks"]] == [0, 0, 0]  # the policy network reads the image alone
    chosen = {row["block"]: row["chosen"] for row in table["blocks"]}
    assert {name: found["obtained"][name] for name in chosen} == chosen
    assert {name for name, precision in chosen.items() if precision == "fp32"} >= set(found["not_faster"])
    plot = (bundle_copy / "calibration" / "mixed.svg").read_text()
    assert plot.startswith("<svg")
    assert plot.count("not measurably faster") == len(found["not_faster"])
    words = ("--data", labelled, "--precision", "mixed", "--limit", 5)  # draws the half of the gates
    assert bdtool_json("evaluate", bundle_copy, *words)["accuracy"] == found["gates"]["accuracy"]


def test_mixed_times_anew_what_it_takes_from_an_earlier_run(calibrate, bundle_copy, monkeypatch):
    """The machine may have been busy then, or asleep."""
    calibrate("--precision", "mixed")
    [cached] = bundle_copy.with_name(".bundle.calibration").glob("sensitivity-*.json")
    assert not any("ms" in figure for row in json.loads(cached.read_bytes())["rows"].values() for figure in row)
    monkeypatch.setattr(
        "bdtool.calibrating.sensitivity._Bench.sensitivity", lambda bench, name: pytest.fail("measured again")
    )
    monkeypatch.setattr(
        "bdtool.calibrating.sensitivity.times_in_turns", lambda first, second: np.array([[2.0, 1.0]] * 4)
    )
    assert calibrate("--precision", "mixed", "--max-accuracy-drop", 100)["not_faster"] == []


def test_mixed_that_loses_more_on_other_images_is_refused(bdtool, bdtool_json, bundle_copy, labelled, monkeypatch):
    chosen_on = "without the 5 of the gates"
    drop = property(lambda gates: 0.0 if gates.input_source.endswith(chosen_on) else 0.7)
    monkeypatch.setattr("bdtool.calibrating.gates.Gates.accuracy_drop", drop)
    words = ("calibrate", bundle_copy, "--data", labelled, "--precision", "mixed", "--eval-limit")
    told = bdtool(*words, 10, status=1)
    assert "blocks, chosen on 5 other images; of the rest" in told.stdout
    assert "mixed.json" not in told.stdout
    assert not (bundle_copy / "calibration").exists()
    found = bdtool_json(*words, 10, status=1)
    assert (found["table"], found["plot"]) == (None, None)
    assert "loses 0.70 percentage points of accuracy, allowed is 0.5. Try more images to choose on" in told.stderr
    assert "1 image for the gates, but mixed precision is chosen on one half" in bdtool(*words, 1, status=1).stderr


@pytest.mark.parametrize("n_images", [2, 5, 40])
def test_halves_have_no_image_in_common(labelled, tiny, n_images):
    images = open_data(str(labelled), network=Bundle.open(tiny.bundle).network).drawn(n_images)
    gates, choosing = halves(images)
    assert sorted([*gates.names, *choosing.names]) == sorted(images.names)
    assert gates.n_images - choosing.n_images in (0, 1)

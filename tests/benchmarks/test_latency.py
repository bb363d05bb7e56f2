"""`benchmarks/latency.py`: its network with random weights runs in every precision; its table is that of the README."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from bdtool.models.parts import network_spec
from bdtool.models.resnet import ResidualBlock
from benchmarks import latency
from benchmarks.latency import random_model

HALF_MAX = 65504
RESULTS = Path(latency.__file__).parent / "results"


def test_random_network_fits_half_precision(preprocessed):
    model, peaks = random_model(), []
    for layer in model.modules():
        if isinstance(layer, ResidualBlock):
            layer.register_forward_hook(lambda layer, inputs, result: peaks.append(float(result.abs().max())))
    images = torch.from_numpy(preprocessed(model, 4))
    with torch.inference_mode():
        logits = model(images)
        assert model.keep_probability(images).std() > 0.01
    assert len(peaks) == model.n_blocks + 3  # the policy network's are among them
    assert max(peaks) < HALF_MAX / 1000  # sums on the way have room, too
    assert logits.std(dim=0).max() > 0.01  # and images still differ


def test_its_policy_network_may_look_at_smaller_images():
    whole, halved = (network_spec(random_model(policy_downscale=factor)).require("policy").flops for factor in (1, 2))
    assert 0.24 < halved / whole < 0.26


def test_table_has_the_means_that_its_ratios_are_of_and_the_aim_of_its_network(capsys):
    """As `benchmarks/README.md` shows them, of the run that lies beside it."""
    stored = json.loads((RESULTS / "latency-epyc-policy-downscale-2.json").read_text())
    latency.print_results(list(zip(latency.CASES * 2, stored["profiles"], strict=True)), stored["timings_s"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    shown = {(row[0], *row[2:4]): (row[4], row[5], row[6], row[9]) for row in rows if len(row) == 10}
    assert shown["1", "distribute:17", "chain"] == ("2.379", "0.860", "0.363", "0.400")
    assert shown["2", "random:17", "chain"] == ("1.142", "0.443", "0.388", "0.377")


@pytest.mark.parametrize("threads", ["x", "0", "1,", ""])
def test_threads_are_refused_before_anything_is_measured(threads, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency.py", "--threads", threads])
    monkeypatch.setattr(latency, "make_bundle", None)
    with pytest.raises(SystemExit, match="2"):
        latency.main()
    assert f"argument --threads: invalid numbers value: {threads!r}" in capsys.readouterr().err


def test_results_of_an_earlier_run_stay_where_new_ones_find_no_room(tmp_path, monkeypatch):
    out = tmp_path / "latency.json"
    out.write_text("earlier")

    def fill_the_disk(path, data):
        with path.open("wb"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    monkeypatch.setattr(sys, "argv", ["latency.py", "--threads", "1", "--out", str(out)])
    monkeypatch.setattr(latency, "make_bundle", lambda bundle, policy_downscale: {})
    monkeypatch.setattr(latency, "run_profile", lambda *arguments: {})
    monkeypatch.setattr(latency, "print_results", lambda runs, timings: None)
    with pytest.raises(OSError, match="No space left"):
        latency.main()
    assert out.read_text() == "earlier"

"""`bdtool run`: labels of image files, the likeliest first."""

import json
import os

import pytest
from click.testing import CliRunner

from bdtool import Orchestrator
from bdtool.cli import main
from bdtool.data.images import read_image
from bdtool.inference import softmax


def test_top_shows_the_most_probable_labels(bdtool, bdtool_json, tiny, picture):
    [row] = bdtool_json("run", tiny.bundle, picture, "--top", 3)["images"]
    with Orchestrator.open(tiny.bundle) as runtime:
        probabilities = softmax(runtime.run(read_image(picture)[None]).logits[0])
    order = probabilities.argsort()[::-1][:3]
    assert [one["class"] for one in row["top"]] == order.tolist()
    assert [one["probability"] for one in row["top"]] == pytest.approx(probabilities[order].tolist())
    assert {key: row[key] for key in ("class", "label", "probability")} == row["top"][0]
    header, first, *others = bdtool("run", tiny.bundle, picture, "--top", 3).stdout.splitlines()
    assert header.split() == ["image", "label", "probability", "blocks_run", "policy"]
    assert first.startswith(str(picture))
    assert [line.split()[0] for line in others] == [one["label"] for one in row["top"][1:]]


def test_one_label_is_the_default_and_all_are_the_most(bdtool_json, tiny, picture):
    [row] = bdtool_json("run", tiny.bundle, picture)["images"]
    assert set(row) == {"image", "class", "label", "probability", "blocks_run", "policy"}
    [row] = bdtool_json("run", tiny.bundle, picture, "--top", 99)["images"]
    assert len(row["top"]) == 10
    assert sum(one["probability"] for one in row["top"]) == pytest.approx(1)


def test_evaluate_shows_top_5_beside_the_accuracy(bdtool, bdtool_json, tiny, npz):
    words = ("evaluate", tiny.bundle, "--data", npz)
    found = bdtool_json(*words)
    assert found["accuracy"] <= found["accuracy_top5"] <= 1
    assert f"\ntop-5 accuracy   {100 * found['accuracy_top5']:.2f} %\n" in bdtool(*words).stdout
    lines = bdtool(*words, "--policy", "learned", "--policy", "all").stdout.splitlines()
    assert lines[1].split()[:4] == ["policy", "accuracy", "top-5", "blocks"]
    assert lines[2].split()[3:5] == [f"{100 * found['accuracy_top5']:.2f}", "%"]


def test_names_that_are_no_utf8_are_printed_as_they_are(bdtool, tiny, picture):
    image = picture.with_name(os.fsdecode(b"photo\xe9.png"))
    picture.rename(image)
    assert b"photo\xe9.png " in bdtool("run", tiny.bundle, image).stdout_bytes


@pytest.mark.parametrize("label", ["猫", "\ud800"])  # in another script than the locale's, and half a character
def test_labels_that_stdout_cannot_encode_are_escaped(bundle_copy, picture, label):
    manifest = bundle_copy / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"labels": [f"{label} é {k}" for k in range(10)]}))
    result = CliRunner(charset="latin-1").invoke(main, ["run", str(bundle_copy), str(picture)])
    assert result.exit_code == 0, result.exception
    assert f"{label.encode('ascii', 'backslashreplace').decode()} é " in result.stdout

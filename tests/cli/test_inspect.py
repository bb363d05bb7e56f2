"""`bdtool inspect`: what a MODEL or a bundle is, and what was made of it."""

import json
import re
import subprocess
import sys

import pytest

from bdtool.inspection import tuned_for
from bdtool.models.shipped import shipped_models
from bdtool.models.store import read_spec


def test_each_step_that_a_model_came_from_is_a_line(bdtool):
    lines = bdtool("inspect", "r32-cifar10").stdout.splitlines()
    labels = ("provenance:", "  from:", "  policy trunk:")
    steps = [line.split(maxsplit=1)[1].removeprefix("trunk:").strip() for line in lines if line.startswith(labels)]
    imitate = ["imitate", "pretrain"]  # behind a step comes its trunk
    stages = ["finetune", *imitate, "finetune", "finetune", "curriculum", *imitate]
    stages += ["finetune", "finetune"]
    trained = [f"bdtool train {stage} on 50000 images of train.npz: accuracy" for stage in stages]
    begins = [*trained, "bdtool import, format akamaster"]
    assert [step[: len(begin)] for step, begin in zip(steps, begins, strict=True)] == begins
    after = lines[1 + next(i for i, line in enumerate(lines) if line.startswith("provenance:"))]
    assert after.strip().startswith("options alpha 0.8, ")
    assert "limit" not in after  # it was not given
    teachers = [line.split()[1:5] for line in lines if line.startswith("  teacher:")]
    assert teachers == 2 * [["bdtool", "import,", "format", "akamaster,"]]


def test_masks_of_a_search_are_listed_by_their_number_of_blocks(bdtool):
    (masks,) = re.findall(r"masks \((.+?)\)", bdtool("inspect", "r32-cifar10").stdout)
    counts = [int(entry.split()[0]) for entry in masks.split(", ")]
    assert counts == sorted(counts)
    assert {5, 15} <= set(counts)


def test_a_base_says_which_policy_it_was_tuned_for():
    """Its accuracy with every block is then no baseline."""
    assert tuned_for(read_spec(shipped_models()["r32-cifar10"]).provenance) == "learned"
    pretrained = {"created_by": "bdtool train pretrain", "options": {"epochs": 3}}
    for policy, expected in (("first:7", "first:7"), ("all", None)):
        tuned = {"created_by": "bdtool train finetune", "options": {"policy": policy}, "start": pretrained}
        assert tuned_for({"created_by": "bdtool train curriculum", "options": {}, "start": tuned}) == expected
    for provenance in (pretrained, {}, {"start": "a name"}):
        assert tuned_for(provenance) is None


def test_bundle_says_what_was_built_and_noted(bdtool, bdtool_json, bundle_copy, npz):
    words = ("--data", npz, "--policy", "random:2")
    assert "engines:        none; `bdtool build` makes them" in bdtool("inspect", bundle_copy).stdout
    bdtool("build", bundle_copy, *words, "--coverage", 1)
    bdtool("profile", bundle_copy, *words, "--strategy", "auto", "--duration", 0.01, "--warmup", 0, "--threads", 2)
    facts = bdtool_json("inspect", bundle_copy)
    [name] = facts["engines"]
    built = facts["built"][name]
    assert built["n_parts"] == len(facts["parts"])
    assert sum(mask["share"] for mask in built["masks"]) == pytest.approx(1)
    [best] = built["recommendations"]
    assert (best["threads"], best["batch"], best["policy"]) == (2, 1, "random:2:0")
    text = bdtool("inspect", bundle_copy).stdout
    assert f"\n  {name}\n" in text
    assert f"{built['n_parts']} of {built['n_parts']} parts, {len(built['masks'])} frequent masks (100.0 %" in text
    assert f"auto is {best['strategy']} (threads 2, batch 1)" in text


_INSPECT = """
import sys
from bdtool.cli import main
main(["inspect", sys.argv[1]], standalone_mode=False)
print("loaded:", *sorted({"torch", "torchvision", "onnx", "onnxruntime"} & set(sys.modules)))
"""


def test_inspect_loads_neither_torch_nor_onnx_nor_an_inference_library(tiny):
    for given in (tiny.path, tiny.bundle):
        command = [sys.executable, "-c", _INSPECT, str(given)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "loaded:", given


def test_model_whose_tensors_are_not_what_it_says_to_be_is_refused(bdtool, random_model, tmp_path):
    """Its header is read alone, and holds the shapes of the tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from bdtool.models.store import save_model

    path = tmp_path / "m.safetensors"
    save_model(random_model("resnet8"), path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["base.stem.conv.weight"] = tensors["base.stem.conv.weight"][:8].clone()
    save_file(tensors, path, metadata=metadata)
    message = bdtool("inspect", path, status=1).stderr
    assert "does not fit the resnet8 in its header (1 mis-shaped: base.stem.conv.weight got [8, 3, 3, 3]" in message


def test_directory_with_one_engine_says_one(bdtool, bundle_copy):
    bdtool("build", bundle_copy)
    [directory] = (bundle_copy / "engines").iterdir()
    for record in directory.glob("*.engine.json"):
        if record.name != "stem.engine.json":
            record.unlink()
    assert "\n                1 of " in bdtool("inspect", bundle_copy).stdout


def test_damaged_notes_are_named_and_the_rest_is_shown(bdtool, bdtool_json, bundle_copy):
    bdtool("build", bundle_copy)
    [directory] = (bundle_copy / "engines").iterdir()
    (directory / "recommendation.json").write_text("{")
    (directory / "paths.json").write_text("[]")
    [built] = bdtool_json("inspect", bundle_copy)["built"].values()
    assert built["masks"] == built["recommendations"] == []
    assert [problem.split(" cannot be read")[0].split("/")[-1] for problem in built["problems"]] == [
        "paths.json",
        "recommendation.json",
    ]
    assert "recommendation.json cannot be read" in bdtool("inspect", bundle_copy).stdout


@pytest.mark.parametrize("provenance", [{"data": "a name", "figures": 3, "options": ["x"], "start": None}, {}])
def test_provenance_of_another_form_is_shown_as_far_as_it_goes(bdtool, bundle_copy, provenance):
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "provenance": {"created_by": "somebody", **provenance}}))
    assert "\nprovenance:     somebody\n" in bdtool("inspect", bundle_copy).stdout

"""A bundle is read only when it is whole; every refusal names the part or field and what to do."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace

import pytest

from bdtool.errors import BundleError, UsageError
from export.bundle import Bundle
from export.manifest import read_manifest, write_manifest


def _edit(bundle, change):
    """Let `change` edit the manifest's JSON in place."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _part(data, name):
    return next(part for part in data["parts"] if part["name"] == name)


def test_opened_bundle_gives_back_what_was_exported(tiny):
    bundle = Bundle.open(tiny.bundle)
    network = bundle.network
    assert (network.arch, network.n_classes, network.stages, network.n_blocks) == ("resnet8", 10, (1, 1, 1), 3)
    assert network.preprocessing == tiny.model.spec.preprocessing
    assert network.has_policy
    assert network.threshold == 0.5
    assert bundle.weights_path.read_bytes() == tiny.path.read_bytes()
    assert bundle.manifest.provenance["created_by"] == "test"


@pytest.mark.parametrize("file", ["onnx/block_01.onnx", "onnx/full.onnx", "weights.safetensors"])
def test_one_changed_byte_is_found_and_named(bundle_copy, file):
    data = bytearray((bundle_copy / file).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_copy / file).write_bytes(data)
    with pytest.raises(
        BundleError, match=f"{re.escape(file)}, has SHA-256 .* was changed or cut short. Copy the bundle"
    ):
        Bundle.open(bundle_copy)
    Bundle.open(bundle_copy, check_digests=False)


def test_truncated_file_is_found_and_named(bundle_copy):
    data = (bundle_copy / "onnx" / "head.onnx").read_bytes()
    (bundle_copy / "onnx" / "head.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=r"part 'head', onnx/head.onnx, has SHA-256"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    ("file", "what"), [("onnx/block_02.onnx", "part 'block_02'"), ("weights.safetensors", "the weights")]
)
def test_missing_file_is_named(bundle_copy, file, what):
    (bundle_copy / file).unlink()
    with pytest.raises(BundleError, match=rf"{what} is missing: no file {re.escape(file)}. Copy the whole bundle"):
        Bundle.open(bundle_copy)


def test_file_that_may_not_be_read_is_named(bundle_copy, monkeypatch):
    def refuse(paths):
        raise PermissionError(errno.EACCES, "Permission denied", str(paths[0]))

    monkeypatch.setattr("export.bundle.sha256_of_files", refuse)  # root may read everything
    with pytest.raises(BundleError, match=r"policy\.onnx cannot be read \(Permission denied\)\. Make the whole bundle"):
        Bundle.open(bundle_copy)


def test_disk_that_fails_is_no_matter_of_permissions(bundle_copy, monkeypatch):
    def fail(paths):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("export.bundle.sha256_of_files", fail)
    with pytest.raises(BundleError, match=r"a file of it cannot be read \(Input/output error\)\. Copy the bundle"):
        Bundle.open(bundle_copy)


def test_symbolic_links_in_a_circle_are_a_missing_file(bundle_copy):
    (bundle_copy / "onnx" / "head.onnx").unlink()
    (bundle_copy / "onnx" / "head.onnx").symlink_to("head.onnx")
    with pytest.raises(BundleError, match=r"part 'head' is missing: no file onnx/head\.onnx"):
        Bundle.open(bundle_copy)


def test_directory_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest.json. Make one: bdtool export"):
        Bundle.open(tmp_path)


def test_directory_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(BundleError, match=r"absent: no such directory. `bdtool export MODEL -o BUNDLE` makes a bundle"):
        Bundle.open(tmp_path / "absent")


def test_newer_format_asks_for_an_upgrade(bundle_copy):
    _edit(bundle_copy, lambda data: data.update(format_version=4, parts="something else by then"))
    with pytest.raises(BundleError, match=r"format_version 4 is newer than this bdtool reads \(3\); upgrade bdtool"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(("interpolation", "version"), [("bilinear", 1), ("bicubic", 2)])
def test_scaling_that_older_versions_do_not_know_is_of_a_newer_format(bundle_copy, interpolation, version):
    """These say that bdtool is to be upgraded, instead of that the file was changed."""
    manifest = read_manifest(bundle_copy)
    preprocessing = replace(manifest.network.preprocessing, interpolation=interpolation)
    changed = replace(manifest, network=replace(manifest.network, preprocessing=preprocessing))
    write_manifest(bundle_copy, changed)
    assert json.loads((bundle_copy / "manifest.json").read_text())["format_version"] == version
    assert read_manifest(bundle_copy) == changed


def test_mask_that_a_base_was_trained_for_is_of_a_newer_format(export_random):
    """Older versions would run every block."""
    bundle = export_random("resnet8", has_policy=False, mask="101").bundle
    data = json.loads((bundle / "manifest.json").read_text())
    assert (data["format_version"], data["policy"]) == (3, "101")
    assert read_manifest(bundle).network.mask == "101"


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (None, "policy is null but a policy part is listed, expected 'learned'"),
        ("101", "mask '101': got a policy network, too, and only one of them can decide"),
        ("sometimes", "mask 'sometimes': expected a string of 3 bits"),
        (101, "mask 101: expected a string of 3 bits"),
    ],
)
def test_policy_that_is_not_the_networks_is_refused(bundle_copy, policy, says):
    _edit(bundle_copy, lambda data: data.update(policy=policy))
    with pytest.raises(BundleError, match=says):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("version", ["1", None, True, 1.0, 0, -1, []])
def test_format_version_must_be_a_number(bundle_copy, version):
    _edit(bundle_copy, lambda data: data.update(format_version=version))
    with pytest.raises(BundleError, match=r"format_version is .*, expected a number from 1 to 3"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["../../outside/pwned", "a/b", "", ".", "stem\0", "stem\n"])
def test_part_whose_name_would_lead_elsewhere_is_refused(bundle_copy, name):
    _edit(bundle_copy, lambda data: _part(data, "stem").update(name=name))
    with pytest.raises(BundleError, match=r"is no name of a part or precision.*do not use this bundle"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "path", ["onnx/stem\0.onnx", "../stem.onnx", "onnx/../../stem.onnx", "/etc/passwd", "", ".", "onnx\\..\\..\\x"]
)
def test_path_that_leaves_the_bundle_is_refused(bundle_copy, path):
    shutil.copy(bundle_copy / "onnx" / "stem.onnx", bundle_copy.parent / "stem.onnx")
    _edit(bundle_copy, lambda data: _part(data, "stem").update(file=path))
    with pytest.raises(BundleError, match="leaves the bundle; do not use this bundle"):
        Bundle.open(bundle_copy)


def test_weights_path_that_leaves_the_bundle_is_refused(bundle_copy):
    _edit(bundle_copy, lambda data: data["weights"].update(file="../weights.safetensors"))
    with pytest.raises(BundleError, match=r"'../weights.safetensors' leaves the bundle"):
        Bundle.open(bundle_copy)


def test_symbolic_link_that_leaves_the_bundle_is_refused(bundle_copy, tmp_path):
    stem = bundle_copy / "onnx" / "stem.onnx"
    stem.rename(tmp_path / "outside.onnx")
    stem.symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(BundleError, match=r"part 'stem', onnx/stem.onnx, leads outside the bundle to .*outside.onnx"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "text", ["", "{", "garbage", "\xff\xfe", '{"format_version": 1', pytest.param("[" * 200_000, id="nested")]
)
def test_garbage_instead_of_json_is_refused(bundle_copy, text):
    (bundle_copy / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"manifest.json is (empty|not JSON).*copy the bundle again, or export"):
        Bundle.open(bundle_copy)


def test_named_pipe_is_not_waited_for(bundle_copy):
    (bundle_copy / "manifest.json").unlink()
    os.mkfifo(bundle_copy / "manifest.json")
    with pytest.raises(
        BundleError, match=r"manifest\.json is a named pipe, which would be waited for; copy the bundle"
    ):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_json_that_is_no_object_is_refused(bundle_copy, text):
    (bundle_copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"holds a JSON .*, expected an object"):
        Bundle.open(bundle_copy)


def test_every_missing_field_is_named(bundle_copy):
    whole = (bundle_copy / "manifest.json").read_text()
    for field in set(json.loads(whole)) - {"format_version"}:
        _edit(bundle_copy, lambda data, field=field: data.pop(field))
        with pytest.raises(BundleError, match=rf"no field '{field}'; the file was changed or cut short"):
            Bundle.open(bundle_copy)
        (bundle_copy / "manifest.json").write_text(whole)


def test_every_missing_field_of_a_part_is_named(bundle_copy):
    whole = (bundle_copy / "manifest.json").read_text()
    for field in json.loads(whole)["parts"][0]:
        _edit(bundle_copy, lambda data, field=field: _part(data, "block_01").pop(field))
        with pytest.raises(BundleError, match=rf"no field '{field}'"):
            Bundle.open(bundle_copy)
        (bundle_copy / "manifest.json").write_text(whole)


def _drop(name):
    return lambda data: data["parts"].remove(_part(data, name))


def _add_precision(name, activation):
    """Add a precision whose parts are the exported ones."""

    def change(data):
        parts = {part["name"]: part for part in data["parts"]}
        data["precisions"] = {name: {"activation": activation, "parts": parts, "calibration": {}}}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(K=4), r"K is 4 but the stages \[1, 1, 1\] have 3 blocks"),
        (lambda data: data.update(K="3"), r"K is 3 but the stages"),
        (lambda data: data.update(stages=[1, 1]), "blocks must be numbered 0 to 1"),
        (_drop("block_01"), "blocks must be numbered 0 to 2 in order; got"),
        (_drop("stem"), "no stem part is listed; export the model again"),
        (_drop("full"), "no full part is listed"),
        (_drop("policy"), "no policy part is listed"),
        (_drop("shortcut_01"), "block_01.* changes the shape but no shortcut is listed"),
        (lambda data: data["parts"].append(data["parts"][0]), "two parts have the same name"),
        (lambda data: _part(data, "stem").update(kind="trunk"), "kind 'trunk' is not one of policy, stem, block"),
        (lambda data: _part(data, "stem").update(sha256="abc"), "'abc' is not a SHA-256 digest"),
        (
            lambda data: _part(data, "stem").update(writes=[]),
            "reads/inputs and writes/outputs must have the same length",
        ),
        (lambda data: data.update(max_batch=0), "max_batch is 0, expected at least 1"),
        (lambda data: data.update(max_batch="many"), "invalid literal"),
        (lambda data: data.update(max_batch=float("inf")), "cannot convert float infinity to integer"),
        (lambda data: data.update(labels=["one"]), "1 labels for 10 classes"),
        (lambda data: data["preprocessing"].update(std=[0, 1, 1]), "std above 0"),
        (lambda data: data["preprocessing"].update(std=[float("nan"), 1, 1]), "std above 0"),
        (lambda data: data["preprocessing"].update(height=0), "numbers of pixels, above 0; got"),
        (lambda data: data["preprocessing"].update(width="32"), "numbers of pixels, above 0; got"),
        (lambda data: data.update(threshold=float("nan")), "threshold is nan, expected a probability"),
        (lambda data: data.update(threshold=7), r"threshold is 7\.0, expected a probability"),
        (lambda data: _part(data, "stem").update(flops=-1), "part 'stem' has -1 FLOPs"),
        (lambda data: _part(data, "head")["dtypes"].update(logits="float99"), "dtype 'float99', not one of float32"),
        (lambda data: _part(data, "head")["shapes"].update(logits=["N", 0]), r"shape \['N', 0\], which is impossible"),
        (lambda data: _part(data, "head")["shapes"].update(logits=[64, 10]), r"shape \[64, 10\], which is impossible"),
        (lambda data: _part(data, "head")["shapes"].update(logits=["N", True]), "which is impossible"),
        (lambda data: _part(data, "head")["shapes"].update(logits=[]), "the file was changed, export the model again"),
        (
            lambda data: _part(data, "head")["shapes"].update(logits=["N", 9]),
            r"part 'head': got logits of shape \['N', 9",
        ),
        (
            lambda data: _part(data, "policy")["shapes"].update(keep_probability=["N", 4]),
            r"part 'policy': got keep_probability of shape \['N', 4\], expected \['N', 3\]; export the model again",
        ),
        (
            lambda data: _part(data, "stem")["shapes"].update(image=["N", 1, 32, 32]),
            r"part 'stem': got image of shape \['N', 1, 32, 32\], expected \['N', 3, 32, 32\]",
        ),
        (lambda data: data["preprocessing"].update(height=16), r"expected \['N', 3, 16, 32\]"),
        (
            lambda data: _part(data, "block_01")["shapes"].update(x=["N", 8, 32, 32]),
            r"part 'block_01': got x of shape \['N', 8, 32, 32\], expected \['N', 16, 32, 32\]",
        ),
        (
            lambda data: _part(data, "shortcut_01")["shapes"].update(y=["N", 32, 32, 32]),
            r"part 'shortcut_01': got x of shape \['N', 32, 32, 32\], expected \['N', 32, 16, 16\]",
        ),
        (
            lambda data: _part(data, "stem")["dtypes"].update(image="uint8"),
            "part 'stem': got image of uint8, expected float32; export the model again",
        ),
        (
            lambda data: _part(data, "block_01")["dtypes"].update(x="float16"),
            "part 'block_01': got x of float16, expected float32",
        ),
        (
            lambda data: _part(data, "policy")["dtypes"].update(keep_probability="float16"),
            "part 'policy': got keep_probability of float16, expected float32",
        ),
        (lambda data: _part(data, "full").update(writes=["z"]), "part 'full': got z, expected to be written by an"),
        (lambda data: _part(data, "shortcut_01").update(writes=["logits"]), "part 'shortcut_01': got no x, expected"),
        (lambda data: _part(data, "block_01").update(reads=["z"]), "got z, expected to be written by an earlier part"),
        (lambda data: _part(data, "block_01").update(writes=["z"]), "got no x, expected to be written for the next"),
        (lambda data: data.update(stages=[10**12]), "blocks must be numbered 0 to 999999999999 in order"),
        (lambda data: data["preprocessing"].update(height=True), "numbers of pixels, above 0; got"),
        (lambda data: data["preprocessing"].update(sharpen=1), "unexpected keyword argument 'sharpen'"),
        (
            lambda data: _part(data, "policy").update(index=0),
            "part 'policy' has index 0, expected null: only blocks and shortcuts have a number",
        ),
        (
            _add_precision("int8", activation="uint8"),
            "precision 'int8' has activation 'uint8', expected 'int8'; run `bdtool calibrate` again",
        ),
        (_add_precision("mixed", activation=None), "precision 'mixed' has activation None, expected 'float32'"),
        (lambda data: data.update(parts=5), "the file was changed, export the model again"),
        (lambda data: data.update(stages=None), "the file was changed, export the model again"),
    ],
)
def test_impossible_manifest_is_refused_with_the_reason(bundle_copy, change, message):
    _edit(bundle_copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle_copy)


def test_moved_bundle_is_still_whole(bundle_copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    bundle = Bundle.open(shutil.move(bundle_copy, tmp_path / "elsewhere" / "renamed"))
    assert all(bundle.part_path(part).is_file() for part in bundle.network.parts)


def test_precision_that_the_bundle_lacks_is_refused(tiny):
    bundle = Bundle.open(tiny.bundle)
    bundle.require_precision("fp32")
    with pytest.raises(BundleError, match=r"has no int8 parts; it has fp32. Use --precision fp32"):
        bundle.require_precision("int8")
    for unknown in ("int4", 8):
        with pytest.raises(UsageError, match=rf"unknown precision {unknown!r}; expected fp32, int8, fp16, bf16, mixed"):
            bundle.require_precision(unknown)

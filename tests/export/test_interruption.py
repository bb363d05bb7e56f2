"""An export that fails, is stopped or killed leaves the earlier bundle whole, and the next run goes on from there."""

import errno
import json
import os
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bdtool.errors import BundleError, ExportError
from bdtool.pipeline import export_model
from export.bundle import Bundle
from export.exporter import export_bundle
from export.files import exclusive_lock, sha256_of_file
from export.manifest import Variant, read_manifest, write_manifest
from export.packages import installed_version

pytestmark = pytest.mark.usefixtures("shared_traces")


@pytest.fixture
def other(random_model, tmp_path):
    """A MODEL of the same architecture as `tiny` with other weights."""
    from bdtool.models.store import save_model

    save_model(random_model("resnet8", shortcut="average-pool", seed=1), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def _stop_after(n_parts, error):
    seen = []

    def on_part(part):
        seen.append(part.name)
        if len(seen) == n_parts:
            raise error

    return on_part


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopped_export_leaves_the_bundle_and_the_rerun_goes_on(other, bundle_copy, digests, error):
    before = digests(bundle_copy)
    with pytest.raises(error):
        export_model(other, bundle_copy, force=True, on_part=_stop_after(4, error))
    assert digests(bundle_copy) == before
    parts = []
    export_model(other, bundle_copy, force=True, on_part=parts.append)
    assert [part.reused for part in parts] == [True] * 4 + [False] * (len(parts) - 4)
    assert Bundle.open(bundle_copy).manifest.files == {part.name: part.file for part in parts}
    assert digests(bundle_copy) != before
    assert sorted(path.name for path in bundle_copy.parent.iterdir()) == ["bundle", "other.safetensors"]


def test_rerun_gives_the_bytes_of_an_undisturbed_run(other, tiny, tmp_path, digests):
    with pytest.raises(KeyboardInterrupt):
        export_model(tiny.path, tmp_path / "bundle", on_part=_stop_after(5, KeyboardInterrupt))
    assert not (tmp_path / "bundle").exists()
    export_model(tiny.path, tmp_path / "bundle")
    assert digests(tmp_path / "bundle" / "onnx") == digests(tiny.bundle / "onnx")


def test_parts_of_another_model_are_not_taken_up(other, tiny, tmp_path, digests):
    with pytest.raises(KeyboardInterrupt):
        export_model(other, tmp_path / "bundle", on_part=_stop_after(5, KeyboardInterrupt))
    parts = []
    export_model(tiny.path, tmp_path / "bundle", on_part=parts.append)
    assert [part.name for part in parts if part.reused] == ["shortcut_01"]  # it has no weights, so nothing differs
    assert digests(tmp_path / "bundle" / "onnx") == digests(tiny.bundle / "onnx")


@pytest.mark.parametrize("package", ["bdtool", "torch", "onnx", "onnxscript"])
def test_parts_of_another_version_are_not_taken_up(tiny, tmp_path, monkeypatch, package):
    with monkeypatch.context() as patch:
        patch.setattr(
            "export.exporter.installed_version", lambda name: "0.0.1" if name == package else installed_version(name)
        )
        with pytest.raises(KeyboardInterrupt):
            export_model(tiny.path, tmp_path / "bundle", on_part=_stop_after(3, KeyboardInterrupt))
    parts = []
    export_model(tiny.path, tmp_path / "bundle", on_part=parts.append)
    assert not [part.name for part in parts if part.reused]


def test_damaged_leftover_is_exported_again(tiny, tmp_path, digests):
    with pytest.raises(KeyboardInterrupt):
        export_model(tiny.path, tmp_path / "bundle", on_part=_stop_after(3, KeyboardInterrupt))
    partial = tmp_path / ".bundle.partial"
    (partial / "onnx" / "stem.onnx").write_bytes(b"half")
    (partial / "records" / "policy.json").write_text("{")
    parts = []
    export_model(tiny.path, tmp_path / "bundle", on_part=parts.append)
    assert [part.name for part in parts if part.reused] == ["block_00"]
    assert digests(tmp_path / "bundle" / "onnx") == digests(tiny.bundle / "onnx")


def test_full_disk_is_named_and_leaves_the_bundle(other, bundle_copy, digests, monkeypatch):
    before, write, written = digests(bundle_copy), Path.write_bytes, []

    def write_until_full(path, data):
        written.append(path)
        if len(written) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_until_full)
        with pytest.raises(BundleError, match=r"No space left on device.*unchanged.*Make room"):
            export_model(other, bundle_copy, force=True)
    assert digests(bundle_copy) == before
    parts = []
    export_model(other, bundle_copy, force=True, on_part=parts.append)
    assert sum(part.reused for part in parts) == 3  # two writes a part: the model and its record


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_a_bundle_is_left_alone(tiny, tmp_path, force):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, what in (
        ("photos", r"exists and is not a bundle: it has no manifest\.json"),
        ("file", "is a file, not a bundle"),
    ):
        with pytest.raises(BundleError, match=rf"{what}; it is left alone. Choose another -o BUNDLE"):
            export_model(tiny.path, tmp_path / name, force=force)
    assert (tmp_path / "photos" / "cat.txt").read_text() == (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"]


def test_manifest_of_another_program_makes_no_bundle(tiny, tmp_path):
    (tmp_path / "extension" / "src").mkdir(parents=True)
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3}')
    with pytest.raises(BundleError, match=r"is not a bundle: its manifest\.json has no format_version and no parts"):
        export_model(tiny.path, tmp_path / "extension", force=True)
    assert (tmp_path / "extension" / "src").is_dir()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b'{"format_version": 1, "parts": [', r"is not JSON, or cut short \(Expecting value: line 1 column 33"),
        (b"\xff\xfe\x00", "is not JSON, or cut short"),
        (b"[" * 100_000, "is not JSON, or cut short"),
        (b"[]", "holds a JSON list, expected an object"),
        (b'{"format_version": 1, "parts": {}}', "has parts that are no list"),
        (b'{"format_version": "1.0", "parts": []}', r"has format_version '1\.0', expected a number from 1 on"),
    ],
)
def test_bundle_that_no_manifest_identifies_is_not_deleted(tiny, bundle_copy, digests, content, why):
    """Whose it is nobody can say then: --force does not replace it, and says what the user can do."""
    (bundle_copy / "manifest.json").write_bytes(content)
    before = digests(bundle_copy)
    with pytest.raises(BundleError, match=rf"bundle: its manifest\.json {why}") as caught:
        export_model(tiny.path, bundle_copy, force=True)
    assert f"it is left alone. If it is what is left of a bundle, remove it yourself (rm -r {bundle_copy})" in str(
        caught.value
    )
    assert digests(bundle_copy) == before


def test_bundle_of_a_newer_format_is_replaced_when_forced(tiny, bundle_copy):
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    (bundle_copy / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    export_model(tiny.path, bundle_copy, force=True)
    assert Bundle.open(bundle_copy).network.arch == "resnet8"


def test_files_of_others_in_a_bundle_are_named_and_left_alone(other, bundle_copy, digests):
    (bundle_copy / "NOTES.txt").write_text("precious")
    before = digests(bundle_copy)
    with pytest.raises(BundleError, match=r"no part of a bundle and would be deleted: NOTES\.txt\. Move it away"):
        export_model(other, bundle_copy, force=True)
    assert digests(bundle_copy) == before


def test_what_killed_commands_left_of_a_bundles_files_goes(tiny, bundle_copy):
    (bundle_copy / ".manifest.json.abcd1234.tmp").touch()  # by a calibration
    partial = bundle_copy.with_name(".bundle.partial")
    partial.mkdir()
    (partial / ".weights.safetensors.abcd1234.tmp").touch()  # by an export
    before = sorted(path.name for path in tiny.bundle.iterdir() if path.name != "engines")
    export_model(tiny.path, bundle_copy, force=True)
    assert sorted(path.name for path in bundle_copy.iterdir()) == before


def test_existing_bundle_needs_force(other, bundle_copy, digests):
    before = digests(bundle_copy)
    with pytest.raises(BundleError, match="already holds a bundle; pass --force to replace it"):
        export_model(other, bundle_copy)
    assert digests(bundle_copy) == before


def test_empty_directory_becomes_the_bundle(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    export_model(tiny.path, tmp_path / "empty")
    assert Bundle.open(tmp_path / "empty").network.arch == "resnet8"


def test_symbolic_link_to_a_bundle_stays_a_link(other, bundle_copy, digests):
    before = digests(bundle_copy)
    link = bundle_copy.with_name("latest")
    link.symlink_to(bundle_copy, target_is_directory=True)
    export_model(other, link, force=True)
    assert link.is_symlink()
    assert digests(bundle_copy) != before
    Bundle.open(link)


def test_working_directory_can_be_the_target(tiny, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_model(tiny.path, Path("."))
    Bundle.open(tmp_path / "here")


def test_engines_come_along_when_the_same_model_is_exported_again(tiny, bundle_copy):
    for name in ("some-fp32", "some-int8"):
        (bundle_copy / "engines" / name).mkdir(parents=True)
    (bundle_copy / "engines" / "some-fp32" / "stem.onnx").write_bytes(b"engine")
    leftover = bundle_copy.with_name(".bundle.partial") / "engines" / "half-copied"  # of a run killed while it copied
    leftover.mkdir(parents=True)
    calibrated = replace(
        read_manifest(bundle_copy),
        variants={"int8": Variant(activation="int8", files=read_manifest(bundle_copy).files, calibration={})},
    )
    write_manifest(bundle_copy, calibrated)
    export_model(tiny.path, bundle_copy, force=True)
    assert (bundle_copy / "engines" / "some-fp32" / "stem.onnx").read_bytes() == b"engine"
    assert os.listdir(bundle_copy / "engines") == ["some-fp32"]  # the int8 parts are gone, too


def test_engines_and_masks_of_another_model_do_not_stay(other, bundle_copy):
    (bundle_copy / "engines" / "some").mkdir(parents=True)
    (bundle_copy / "engines" / "some" / "paths.json").write_text("{}")
    export_model(other, bundle_copy, force=True)
    assert not (bundle_copy / "engines").exists()


def test_concurrent_export_to_the_same_place_is_refused(other, bundle_copy, digests):
    before, lock = digests(bundle_copy), bundle_copy.with_name(".bundle.lock")
    refused = pytest.raises(
        BundleError, match=r"an export or a pack to .*bundle, or a calibration of it, is already running"
    )
    with exclusive_lock(lock, purpose="the other export"), refused:
        export_model(other, bundle_copy, force=True)
    assert digests(bundle_copy) == before
    export_model(other, bundle_copy, force=True)


def test_parts_of_an_abandoned_model_do_not_stay_in_the_bundle(tiny, export_random, tmp_path):
    deeper = export_random("resnet14", shortcut="average-pool")
    with pytest.raises(KeyboardInterrupt):
        export_model(deeper.path, tmp_path / "bundle", on_part=_stop_after(7, KeyboardInterrupt))
    export_model(tiny.path, tmp_path / "bundle")
    assert len(os.listdir(tmp_path / "bundle" / "onnx")) == len(Bundle.open(tmp_path / "bundle").network.parts)
    assert sorted(os.listdir(tmp_path / "bundle")) == ["manifest.json", "onnx", "weights.safetensors"]


_EXPORT_SLOWLY = """
import sys, time
from pathlib import Path
from bdtool.pipeline import export_model

def on_part(part):
    print(part.name, flush=True)
    if part.name == "block_00":
        time.sleep(600)

export_model(Path(sys.argv[1]), Path(sys.argv[2]), force=True, on_part=on_part)
"""


def test_killed_export_leaves_the_bundle_and_the_rerun_goes_on(other, bundle_copy, digests, start_python):
    before = digests(bundle_copy)
    process = start_python(_EXPORT_SLOWLY, other, bundle_copy)
    done = [process.stdout.readline().strip() for _ in range(3)]
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert done == ["policy", "stem", "block_00"]
    assert digests(bundle_copy) == before
    Bundle.open(bundle_copy)
    parts = []
    export_model(other, bundle_copy, force=True, on_part=parts.append)
    assert [part.name for part in parts if part.reused] == done
    assert Bundle.open(bundle_copy).manifest.provenance["model_sha256"] != ""


def test_what_a_killed_run_had_not_yet_removed_of_the_bundle_before_does_not_stay(tiny, tmp_path):
    """It lies where the new one was made, once the two have changed places."""
    partial = tmp_path / ".bundle.partial"
    for calibrated in ("onnx/int8/stem-0123456789ab.onnx", "calibration/mixed.json"):
        (partial / calibrated).parent.mkdir(parents=True)
        (partial / calibrated).touch()
    (partial / "engines").symlink_to(tmp_path)
    export_model(tiny.path, tmp_path / "bundle")
    assert sorted(os.listdir(tmp_path / "bundle")) == ["manifest.json", "onnx", "weights.safetensors"]
    assert "int8" not in os.listdir(tmp_path / "bundle" / "onnx")
    assert os.listdir(tmp_path) == ["bundle"]


def test_bundle_can_be_exported_anew_from_its_own_weights(bundle_copy, digests):
    before = digests(bundle_copy / "onnx")
    export_model(bundle_copy / "weights.safetensors", bundle_copy, force=True)
    assert digests(bundle_copy / "onnx") == before


def test_missing_weights_file_stops_the_export(tiny, tmp_path, preprocessed):
    from bdtool.models.parts import network_spec, part_modules

    options = {"images": preprocessed(tiny.model, 2), "max_batch": 1, "provenance": {}}
    with pytest.raises(BundleError, match="No such file"):
        export_bundle(
            network_spec(tiny.model),
            part_modules(tiny.model),
            weights_path=tmp_path / "absent",
            target=tmp_path / "bundle",
            **options,
        )
    assert not (tmp_path / "bundle").exists()


def test_model_that_is_replaced_during_an_export_is_refused(other, tiny, tmp_path):
    model = Path(shutil.copy(tiny.path, tmp_path / "model.safetensors"))
    with pytest.raises(ExportError, match=r"model\.safetensors was replaced while it was exported: .* run the same"):
        export_model(model, tmp_path / "bundle", on_part=lambda part: shutil.copy(other, model))
    assert not (tmp_path / "bundle").exists()
    shutil.copy(tiny.path, model)
    assert export_model(model, tmp_path / "bundle").weights_sha256 == sha256_of_file(tiny.path)


def test_bundle_that_another_export_finished_meanwhile_is_left_alone(other, tiny, tmp_path, digests, monkeypatch):
    @contextmanager
    def lock_of_the_slower(target):
        shutil.copytree(tiny.bundle, tmp_path / "bundle")
        yield

    monkeypatch.setattr("export.exporter.export_lock", lock_of_the_slower)
    with pytest.raises(BundleError, match="already holds a bundle; pass --force"):
        export_model(other, tmp_path / "bundle")
    assert digests(tmp_path / "bundle") == digests(tiny.bundle)


_EXPORT_STOPPED_IN_AN_IMPORT = """
import sys
from pathlib import Path
from bdtool.pipeline import export_model

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._dynamo.decorators":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

assert "torch._dynamo" not in sys.modules
sys.meta_path.insert(0, CtrlC())
export_model(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_ctrl_c_while_torch_imports_its_tracer_is_no_fault_of_the_model(tiny, tmp_path, start_python):
    process = start_python(_EXPORT_STOPPED_IN_AN_IMPORT, tiny.path, tmp_path / "bundle")
    _, stderr = process.communicate(timeout=120)
    assert stderr.endswith("\nKeyboardInterrupt\n")
    assert process.returncode != 0

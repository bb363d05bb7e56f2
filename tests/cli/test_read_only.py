"""Commands on a bundle that cannot be written to."""

import os

import pytest

from engines.store import EngineStore


@pytest.fixture
def read_only(bundle_copy, monkeypatch):
    real = os.access  # for root every place is writable, whatever its mode
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle_copy and real(path, mode))
    return bundle_copy


def test_one_warning_names_all_that_a_read_only_bundle_does_not_keep(read_only, bdtool, npz, digests):
    before = digests(read_only)
    words = ("--strategy", "auto", "--data", npz, "--duration", 0.01, "--warmup", 0)
    result = bdtool("profile", read_only, *words)
    [warning] = [line for line in result.stderr.splitlines() if "read-only" in line]
    assert warning.startswith(f"warning: {read_only} is read-only and does not keep the engines onnxruntime-")
    assert " and the recommendation that strategy `auto` takes: for this run only" in warning
    assert "it was not recorded" in result.stdout
    assert digests(read_only) == before


def test_engines_that_cannot_be_added_to_are_built_elsewhere(bundle_copy, bdtool, npz, monkeypatch, digests):
    engines = bundle_copy / "engines"
    engines.mkdir(exist_ok=True)
    real, before = os.access, digests(bundle_copy)
    monkeypatch.setattr(os, "access", lambda path, mode: path != engines and real(path, mode))
    assert "is read-only and does not keep the engines" in bdtool("evaluate", bundle_copy, "--data", npz).stderr
    assert digests(bundle_copy) == before


def test_engines_of_a_read_only_bundle_are_built_once_a_command(read_only, bdtool, npz, monkeypatch):
    built = []
    real = EngineStore._write

    def write(self, part, engine):
        built.append((self.directory.name, part.name))
        return real(self, part, engine)

    monkeypatch.setattr(EngineStore, "_write", write)
    bdtool("verify", read_only, "--data", npz, "--limit", 4)
    assert len(built) == len(set(built)) > 0


def test_read_only_bundle_is_neither_replaced_nor_calibrated(read_only, bdtool, tiny, npz, digests):
    before, beside = digests(read_only), sorted(read_only.parent.iterdir())
    message = bdtool("export", tiny.path, "-o", read_only, "--force", status=1).stderr
    assert f"{read_only} is not replaced: {read_only} is read-only. Make it writable (chmod -R u+w" in message
    message = bdtool("calibrate", read_only, "--data", npz, status=1).stderr
    assert f"{read_only} is read-only, and its int8 parts would have no place. Make it writable" in message
    assert digests(read_only) == before
    assert sorted(read_only.parent.iterdir()) == beside


def test_directory_of_a_bundle_that_is_read_only_is_named(bundle_copy, bdtool, npz, monkeypatch, digests):
    parent, before, real = bundle_copy.parent, digests(bundle_copy), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != parent and real(path, mode))
    message = bdtool("calibrate", bundle_copy, "--data", npz, status=1).stderr
    assert f"Error: {parent}: a calibration keeps what it has measured there, in .bundle.calibration" in message
    assert "cannot be written (Permission denied). Make that directory writable, or calibrate a copy" in message
    assert digests(bundle_copy) == before


def test_masks_of_a_read_only_bundle_are_not_counted(read_only, bdtool, npz, monkeypatch, digests):
    monkeypatch.setattr("bdtool.frequent_masks.frequent_masks", lambda *_, **__: pytest.fail("counted"))
    before = digests(read_only)
    for option in (("--paths", 2), ("--coverage", 0.9)):
        message = bdtool("build", read_only, "--data", npz, *option, status=1).stderr
        assert f"{read_only} is read-only, and its keep masks would have no place. Make it writable" in message
    assert digests(read_only) == before

"""Files and directories are whole or absent."""

import fcntl
import os
import re
import stat
import threading
import time
from pathlib import Path

import pytest

from bdtool.errors import BundleError
from export import files
from export.files import (
    atomic_path,
    exclusive_lock,
    json_from_bytes,
    sha256_of_bytes,
    sha256_of_files,
    swap_directory,
    write_bytes,
    write_output,
)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_content(tmp_path, error):
    (tmp_path / "file").write_text("old")

    def write_half():
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half of the ne")
            raise error

    with pytest.raises(error):
        write_half()
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_replaces_the_old_content(tmp_path):
    write_bytes(tmp_path / "file", b"old")
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_written_files_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "file", b"")
        assert os.umask(umask) == umask  # asking for it did not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_writer_that_puts_a_private_file_there_makes_no_private_one(tmp_path):
    """As safetensors does since 0.8."""
    before = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_umask_is_not_touched(tmp_path, monkeypatch):
    """It belongs to all threads: while it is another one, their files are as readable as it says."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    write_bytes(tmp_path / "file", b"")


def test_digests_come_in_the_order_of_the_paths(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    expected = [sha256_of_bytes(name.encode()) for name in "cab"]
    assert sha256_of_files([tmp_path / name for name in "cab"]) == expected


@pytest.fixture(params=["exchange", "two renames"])
def directories(request, tmp_path, monkeypatch):
    """A new directory and an old one, on a system that can exchange two names and on one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for name in ("new", "target"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_text(name)
    return tmp_path


def test_swap_puts_the_new_directory_in_place_of_the_old(directories):
    swap_directory(directories / "new", directories / "target")
    assert (directories / "target" / "inner" / "file").read_text() == "new"
    assert os.listdir(directories) == ["target"]


def test_target_is_never_absent_where_names_can_be_exchanged(tmp_path, monkeypatch):
    for name in ("new", "target", "probe"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not files._exchange(tmp_path / "probe", tmp_path / "target"):
        pytest.skip("this system or file system cannot exchange two names in one step")
    assert (tmp_path / "target" / "file").read_text() == "probe"
    monkeypatch.setattr(type(tmp_path), "rename", lambda *_: pytest.fail("the target was absent for a moment"))
    swap_directory(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "new"


def test_swap_needs_no_old_directory(directories):
    swap_directory(directories / "new", directories / "elsewhere")
    assert (directories / "elsewhere" / "inner" / "file").read_text() == "new"
    assert (directories / "target" / "inner" / "file").read_text() == "target"


def test_second_rename_that_fails_brings_the_old_directory_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    (tmp_path / "target").mkdir()
    with pytest.raises(FileNotFoundError):
        swap_directory(tmp_path / "absent", tmp_path / "target")
    assert os.listdir(tmp_path) == ["target"]


def test_leftover_of_a_killed_swap_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for name in ("new", "target", "new.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    swap_directory(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_second_holder_of_a_lock_is_refused(tmp_path):
    refused = pytest.raises(BundleError, match="an export is already running in another process")
    with (
        exclusive_lock(tmp_path / "lock", purpose="x"),
        refused,
        exclusive_lock(tmp_path / "lock", purpose="an export"),
    ):
        pytest.fail("two hold the lock")
    with exclusive_lock(tmp_path / "lock", purpose="x"):
        pass
    assert not list(tmp_path.iterdir())


def test_second_holder_of_a_lock_may_wait(tmp_path, caplog):
    order = []

    def second():
        with exclusive_lock(tmp_path / "lock", purpose="a build", wait=True):
            order.append("second")

    with exclusive_lock(tmp_path / "lock", purpose="x"):
        thread = threading.Thread(target=second)
        thread.start()
        until = time.monotonic() + 60
        while "a build is already running" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
        assert "; waiting for it" in caplog.text
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_lock_that_its_holder_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """A process that opened the file just before its holder removed it must not share the next holder's place."""
    path, flock, waited = tmp_path / "lock", fcntl.flock, []

    def flock_after_the_holder_left(file, flags):
        if not waited:
            waited.append(path.unlink())
        flock(file, flags)

    monkeypatch.setattr("export.files.fcntl.flock", flock_after_the_holder_left)
    refused = pytest.raises(BundleError, match="already running")
    with exclusive_lock(path, purpose="x"), refused, exclusive_lock(path, purpose="x"):
        pytest.fail("two hold the lock")


def test_output_goes_through_a_symbolic_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for data in (b"first", b"second"):
        write_output(tmp_path / "link", data)
        assert (tmp_path / "target").read_bytes() == data
    assert (tmp_path / "link").is_symlink()


def test_output_replaces_a_file_and_does_not_write_over_it(tmp_path):
    """Whoever has the old one open reads it to its end, and an interruption leaves it whole."""
    (tmp_path / "file").write_bytes(b"old")
    with (tmp_path / "file").open("rb") as reader:
        write_output(tmp_path / "file", b"new")
        assert reader.read() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new"


def test_output_goes_straight_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output(tmp_path / "pipe", b"data")
    assert os.read(reader, 10) == b"data"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_output_that_cannot_be_written_is_named_as_the_user_did(tmp_path):
    (tmp_path / "taken").mkdir()
    for place in (Path("/dev/full"), tmp_path / "taken", tmp_path / "absent" / "file"):
        with pytest.raises(OSError, match=re.escape(f"'{place}'")) as caught:
            write_output(place, b"data")
        assert caught.value.filename == str(place)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "taken"]


@pytest.mark.parametrize(
    "text",
    [pytest.param("[" * 200_000, id="nested"), "[" * 201 + "]" * 201, '{"a":' * 300 + "1" + "}" * 300, "[", "\xff", ""],
)
def test_json_that_is_garbage_or_nested_without_end_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"nested more than 200 deep|Expecting|codec"):
        json_from_bytes(text.encode("latin-1"))


def test_json_of_our_own_is_read():
    assert json_from_bytes(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    assert json_from_bytes("[" * 200 + "]" * 200)


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    with atomic_path(tmp_path / "net.v1") as temporary:
        pass
    temporary.touch()  # as a kill would have left it
    others = [".net.abcd_123.tmp", ".net.v1.checkpoint.abcd_123.tmp", ".netxv1.abcd_123.tmp", ".net.v1.lock", "net.v1"]
    for name in others:
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path, ["net.v1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_young_files_are_no_leftovers_where_others_write(tmp_path):
    with atomic_path(tmp_path / "file") as temporary:
        files.remove_leftovers(tmp_path, min_age_s=3600)
        temporary.write_bytes(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    old = tmp_path / ".file.abcd1234.tmp"
    old.touch()
    os.utime(old, (0, time.time() - 3700))
    files.remove_leftovers(tmp_path, min_age_s=3600)
    assert os.listdir(tmp_path) == ["file"]

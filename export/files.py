"""Files that are whole or absent: atomic writes, digests, directory swaps and locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bdtool.errors import BundleError

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_LEFTOVER = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")  # as `atomic_path` names them, and tempfile did before
_MAX_DEPTH = 200  # of JSON; ours has less than 10 levels, and two more for each training that a MODEL went through


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is synced to disk and renamed over `path`.

    On any exception, Ctrl-C included, the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)  # as readable as any other file
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(mode)  # whoever wrote may have put a private file in its place, as safetensors does
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path, names: Collection[str] | None = None, *, min_age_s: float = 0) -> None:
    """Remove what killed processes left of files of these names in a directory; None: of all files.

    Without an age it is for whoever alone writes them, as by a lock; what another process is writing is young.
    """
    newest = time.time() - min_age_s if min_age_s else math.inf
    for entry in directory.iterdir():
        if is_leftover(entry.name, names):
            with suppress(OSError):  # another process removes it, too
                if entry.stat().st_mtime <= newest:
                    entry.unlink()


def is_leftover(name: str, names: Collection[str] | None = None) -> bool:
    """Say whether a file is named as `atomic_path` names the temporary file of one of `names`; None: of any."""
    leftover = _LEFTOVER.fullmatch(name)
    return leftover is not None and (names is None or leftover[1] in names)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON to `path` atomically."""
    write_bytes(path, bytes_from_json(data))


def bytes_from_json(data: Any) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def json_from_bytes(data: bytes | str) -> Any:
    """Read JSON of which nothing is known: whatever is wrong with it is a ValueError, nesting without end included.

    Whoever walks what it returns may do so by calls that call themselves.
    """
    try:
        value = json.loads(data)
    except RecursionError as exc:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep") from exc
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def _inside(outer: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer


def write_output(path: Path, data: bytes) -> None:
    """Write to a place that a user named: atomically, a symbolic link staying one, or straight to a device or pipe.

    Raises:
        OSError: it cannot be written; its `filename` is the place, not the temporary file beside it.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)  # /dev/null, /dev/fd/3: nothing could be renamed over it
        else:
            write_bytes(path.resolve(), data)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror or str(exc), str(path)) from exc


def advice_on(error: OSError) -> str:
    """Return what to do about a place that cannot be written to."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make the place writable"
    return "clear the way"


def sha256_of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Sequence[Path]) -> list[str]:
    """Return the digests of several files, read side by side: hashing lets other threads run."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_of_file, paths))


def swap_directory(new: Path, target: Path) -> None:
    """Put the directory `new` in the place of `target`, which may exist, and remove what was there.

    Where the system can exchange two names in one step (Linux), `target` names a whole directory at every moment.
    """
    if not target.exists():
        new.rename(target)
    elif _exchange(new, target):
        shutil.rmtree(new)
    else:
        previous = new.with_name(new.name + ".previous")
        if previous.exists():  # a process was killed while it removed it
            shutil.rmtree(previous)
        target.rename(previous)
        try:
            new.rename(target)
        except BaseException:
            previous.rename(target)
            raise
        shutil.rmtree(previous)
    _sync(target.parent)


@contextmanager
def exclusive_lock(path: Path, *, purpose: str, wait: bool = False) -> Iterator[None]:
    """Hold an advisory lock on the file `path`, which goes with it; the system frees it when the process dies.

    Args:
        wait: until whoever holds it, another thread or process, has let go.

    Raises:
        BundleError: another process holds it, and `wait` is False.
    """
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                if not wait:
                    raise BundleError(
                        f"{purpose} is already running in another process (lock {path}); wait for it"
                    ) from exc
                logger.warning("%s is already running (lock %s); waiting for it", purpose, path)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):  # its holder has removed it since we opened it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextmanager
def export_lock(target: Path) -> Iterator[None]:
    """Hold the lock under which a bundle's parts change: by an export or a pack to `target`, or a calibration's end.

    Raises:
        BundleError: another process holds it.
    """
    target = target.resolve()  # "." has no name, and a symbolic link names the same bundle
    with exclusive_lock(
        target.with_name(f".{target.name}.lock"), purpose=f"an export or a pack to {target}, or a calibration of it,"
    ):
        yield


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _exchange(first: Path, second: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(result == 0)  # not every file system can: the caller then renames twice


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

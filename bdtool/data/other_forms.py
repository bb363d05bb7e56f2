"""A directory without images whose content has another form of DATA: which one, and what to pass."""

from __future__ import annotations

import shlex
from pathlib import Path

from bdtool.data.layouts import CIFAR10_BINARY, CIFAR_ARCHIVES, CIFAR_FILES, CIFAR_FOLDERS, Split

_N_NAMED = 3


def other_form(root: Path, *, split: Split) -> str | None:
    """Return what `root` holds and what to pass as DATA instead; None where nothing is known there.

    No option is named: the directory may have come by --data, --val or --eval.
    """
    files = {path.name for path in root.iterdir() if path.is_file()}
    return _arrays(root, files, split) or _cifar(root, files) or _packed(root, files)


def _arrays(root: Path, files: set[str], split: Split) -> str | None:
    arrays = sorted(name for name in files if name.lower().endswith(".npz"))
    if not arrays:
        return None
    named = ", ".join(arrays[:_N_NAMED]) + (", ..." if len(arrays) > _N_NAMED else "")
    best = next((name for name in arrays if split in name.lower()), arrays[0])
    return f"it holds {named}; pass the file itself: {shlex.quote(str(root / best))}"


def _cifar(root: Path, files: set[str]) -> str | None:
    for name, folder in CIFAR_FOLDERS.items():
        if CIFAR_FILES[name] <= files:
            return f"it holds {name}'s own files; pass {shlex.quote(f'{name}:{root}')}"
        if (root / folder).is_dir():
            return f"it holds {folder}; pass {shlex.quote(f'{name}:{root}')}"
    return None


def _packed(root: Path, files: set[str]) -> str | None:
    """Name what is to be unpacked, or fetched in another version, before a data set can be read."""
    for name, archive in CIFAR_ARCHIVES.items():
        if archive in files:
            return f"it holds {archive}; unpack that there (tar -xzf), then pass {shlex.quote(f'{name}:{root}')}"
    if CIFAR10_BINARY in files:
        wanted = CIFAR_ARCHIVES["cifar10"]
        return f"it holds CIFAR-10's binary version; cifar10:ROOT reads the Python version, {wanted} unpacked"
    return None

"""The second build of an unchanged bundle against the first, as a command and without the start of Python.

    python benchmarks/builds.py BUNDLE...

Works on copies: the bundles stay as they are.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from engines.registry import identify_backend, open_backend
from engines.store import EngineStore
from export.bundle import Bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    print("| network | measured | first build, s | second, s | ratio |\n|---|---|---|---|---|")
    for path in parser.parse_args().bundles:
        with tempfile.TemporaryDirectory(prefix="bdtool-benchmark-") as directory:
            bundle = Path(directory) / "bundle"
            shutil.copytree(path, bundle)
            arch = Bundle.open(bundle).network.arch
            for name, build in (("`bdtool build`", build_by_command), ("in one process", build_in_process())):
                first, second = time_twice(bundle, build)
                print(f"| {arch} | {name} | {first:.3f} | {second:.3f} | {second / first:.3f} |", flush=True)


def time_twice(bundle: Path, build: Callable[[Path], object]) -> tuple[float, float]:
    """Return the seconds of a build from nothing and of one that finds everything."""
    shutil.rmtree(bundle / "engines", ignore_errors=True)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        build(bundle)
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def build_by_command(bundle: Path) -> None:
    command = [sys.executable, "-m", "bdtool", "build", str(bundle)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def build_in_process() -> Callable[[Path], object]:
    """Return a function that does what the command does, with ONNX Runtime loaded already."""
    identity = identify_backend("onnxruntime", "cpu")
    library = open_backend("onnxruntime", "cpu", threads=1)
    return lambda bundle: EngineStore(Bundle.open(bundle, check_digests=False), identity).build(lambda: library)


if __name__ == "__main__":
    main()

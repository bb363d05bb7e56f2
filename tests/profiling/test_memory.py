"""The peak memory of a profile is its own process's."""

import subprocess
import sys

import numpy as np

from bdtool.profiling.memory import peak_memory_mib

WORDS = ["-c", "from bdtool.profiling.memory import peak_memory_mib; print(peak_memory_mib())"]
LARGE_MIB = 256


def test_peak_memory_is_not_that_of_what_started_the_process():
    become = f"import os, sys; x = b'x' * ({LARGE_MIB} << 20); os.execv(sys.executable, [sys.executable, *{WORDS}])"
    started = subprocess.run([sys.executable, "-c", become], capture_output=True, text=True, check=True, timeout=60)
    assert 1 < float(started.stdout) < LARGE_MIB / 2


def test_peak_memory_holds_what_was_freed():
    before = peak_memory_mib()
    pages = np.ones(LARGE_MIB << 20, np.uint8)
    del pages
    assert before is not None
    assert peak_memory_mib() >= max(before, LARGE_MIB)

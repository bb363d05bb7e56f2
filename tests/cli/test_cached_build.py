"""A build with nothing to do is quick because it loads nothing."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_PROGRAM = """
import sys
from bdtool.cli import main
main(["build", sys.argv[1]], standalone_mode=False)
loaded = [name for name in ("torch", "onnx", "onnxruntime", "numpy") if name in sys.modules]
sys.exit(f"loaded {loaded}" if loaded else 0)
"""


def test_second_build_loads_no_heavy_library(bdtool, bundle_copy):
    bdtool("build", bundle_copy)
    command = [sys.executable, "-c", _PROGRAM, str(bundle_copy)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "0 built" in result.stdout

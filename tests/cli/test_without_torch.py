"""On a machine that only runs bundles PyTorch may be left out, as README says."""

import subprocess
import sys
import textwrap

import pytest

_WITHOUT = """
    import sys
    for name in ("torch", "torchvision", "onnxscript"):
        sys.modules[name] = None  # importing it fails as if it were not there
    from bdtool.cli import main
    main(sys.argv[1:])
"""


def _bdtool_without_torch(*words):
    command = [sys.executable, "-c", textwrap.dedent(_WITHOUT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_bundles_are_built_run_calibrated_and_profiled(bundle_copy, npz, picture, tmp_path):
    data = ("--data", npz)
    for words in (
        ("build", bundle_copy, "--no-resume"),
        ("run", bundle_copy, picture),
        ("evaluate", bundle_copy, *data),
        ("calibrate", bundle_copy, *data, "--max-accuracy-drop", 100, "--at-least", 1),
        ("profile", bundle_copy, *data, "--strategy", "chain,path,fused,chain@int8", "--duration", "0.02"),
        ("fuse", bundle_copy, "-o", tmp_path / "model.onnx"),
        ("inspect", bundle_copy),
        ("verify", bundle_copy, *data),
        ("verify", bundle_copy, *data, "--precision", "int8"),
    ):
        result = _bdtool_without_torch(*words)
        assert result.returncode == 0, (words, result.stderr)


def test_what_needs_it_says_so(tiny, tmp_path):
    result = _bdtool_without_torch("export", tiny.path, "-o", tmp_path / "bundle")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "Error: this needs torch, which is not installed; add it with: pip"
    )

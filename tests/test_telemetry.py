"""Nothing but bdtool's own work happens in a process that imports it."""

import os
import subprocess
import sys


def _run(code, home):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_", "CI"))}
    command = [sys.executable, "-c", code]
    subprocess.run(command, env=environment | {"HOME": str(home)}, check=True, timeout=60)


def test_onnxruntime_keeps_no_identity_of_the_machine(tmp_path):
    _run("import bdtool, onnxruntime as ort; ort.SessionOptions()", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fork_ends_like_any_process(tmp_path):
    code = "import os, signal, bdtool, onnxruntime; child = os.fork(); signal.alarm(30)"
    code += "\nif child: os._exit(os.wait()[1] != 0)"
    _run(code, tmp_path)

"""NVIDIA's Triton Inference Server, from the wheel that `make test` puts beside the other packages."""

from __future__ import annotations

import http.client
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

_WHEEL = Path(sys.prefix, "triton")
_SERVER = _WHEEL / "pytriton" / "tritonserver"
_PROGRAM = _SERVER / "bin" / "tritonserver"
_STUB = "triton_python_backend_stub"
_LEAST_GLIBC = (2, 35)
_PATIENCE_S = 60  # with a server that is told to end


def why_not() -> str | None:
    """Return why the server cannot be started here; None: it can."""
    if not _PROGRAM.is_file():
        return "Triton is not installed: make test does it, where there is a wheel for this machine"
    library = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")
    if not library.is_file() or library.suffix == ".a":
        return "this Python has no shared library, which Triton's Python backend loads"
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split("."))) < _LEAST_GLIBC:
        return f"Triton needs glibc 2.35 or newer, this is {name} {version}"
    tried = subprocess.run([_PROGRAM, "--help"], capture_output=True, text=True)
    if "--model-repository" not in tried.stdout + tried.stderr:
        return f"Triton does not start here: {tried.stderr.strip()}"
    if not os.access("/dev/shm", os.W_OK):
        return "Triton's Python backend needs shared memory, and /dev/shm cannot be written"
    return None


class TritonServer:
    """Triton, serving a repository over HTTP until it is stopped.

    Args:
        directory: an empty one, for what it needs and its log.
    """

    def __init__(self, repository: Path, directory: Path) -> None:
        self._log_path = directory / "log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        backend = directory / "backends" / "python"
        backend.mkdir(parents=True)
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        for file in (*(_SERVER / "backends" / "python").glob("*.*"), _SERVER / "python_backend_stubs" / python / _STUB):
            shutil.copy(file, backend)
        environment = os.environ | {  # the stub takes the first Python of PATH
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "LD_LIBRARY_PATH": os.pathsep.join(
                [sysconfig.get_config_var("LIBDIR"), str(_WHEEL / "nvidia_pytriton.libs")]
            ),
        }
        options = {"model-repository": repository, "backend-directory": backend.parent, "http-port": self.port}
        options |= {"http-address": "127.0.0.1", "allow-grpc": "false", "allow-metrics": "false"}
        words = [f"--{name}={value}" for name, value in options.items()]
        with self._log_path.open("wb") as log:
            command = [_PROGRAM, "--disable-auto-complete-config", *words]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def is_ready(self) -> bool:
        """Wait until it serves; False where it ended instead."""
        while self._process.poll() is None:
            try:
                with Connection(self.port) as connection:
                    if connection.is_ready():
                        return True
            except OSError:
                pass
            time.sleep(0.1)
        return False


class Connection:
    """One client, whose requests follow one another."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def is_ready(self) -> bool:
        self._http.request("GET", "/v2/health/ready")
        response = self._http.getresponse()
        response.read()
        return response.status == 200

    def infer(self, model: str, pixels: np.ndarray, **output: Any) -> dict[str, np.ndarray]:
        """Return outputs by name, all or the one asked for, of pixels uint8 [n, height, width, 3], sent as bytes."""
        data = pixels.tobytes()
        image = {"name": "image", "shape": pixels.shape, "datatype": "UINT8"}
        image["parameters"] = {"binary_data_size": len(data)}
        question = json.dumps({"inputs": [image]} | ({"outputs": [output]} if output else {})).encode()
        headers = {"Inference-Header-Content-Length": str(len(question))}
        self._http.request("POST", f"/v2/models/{model}/infer", question + data, headers)
        response = self._http.getresponse()
        answer = response.read()
        assert response.status == 200, answer
        return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in json.loads(answer)["outputs"]}

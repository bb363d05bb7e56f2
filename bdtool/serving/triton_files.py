"""The files of a model in Triton's repository, beside the bundle that it serves.

Source: Triton's model repository and model configuration, and its Python backend, as their documentation has them.
"""

from __future__ import annotations

from pathlib import Path

from engines.base import DEFAULT_BACKEND
from export.bundle import Bundle
from export.files import write_bytes

VERSION = "1"
BUNDLE = "bundle"  # in the directory of the version
IMAGE, LOGITS, KEEP = "image", "logits", "keep"
_LABELS = "labels.txt"
_MODEL = '''"""Serves the bundle beside this file. The Python of Triton's Python backend needs bdtool."""

from bdtool.serving.triton import TritonPythonModel as TritonPythonModel
'''
_CONFIG = """# Written by `bdtool pack --triton`. Images are pixels as they are, RGB.
# Parameters are arguments of bdtool.Orchestrator.open; "threads", "threshold" and "cuda_graph" may be added.
# Instances of KIND_GPU open the bundle on their GPU, and need a "backend" that runs there.
backend: "python"
max_batch_size: {max_batch}
input [ {{ name: "{image}", data_type: TYPE_UINT8, dims: [ {height}, {width}, 3 ] }} ]
output [
  {{ name: "{logits}", data_type: TYPE_FP32, dims: [ {n_classes} ]{labels} }},
  {{ name: "{keep}", data_type: TYPE_UINT8, dims: [ {n_blocks} ] }}
]
instance_group [ {{ kind: {kind}, count: 1 }} ]
dynamic_batching {{ }}
parameters [
  {{ key: "backend", value: {{ string_value: "{backend}" }} }},
  {{ key: "precision", value: {{ string_value: "{precision}" }} }},
  {{ key: "strategy", value: {{ string_value: "chain" }} }}
]
"""


def write_triton_files(directory: Path, bundle: Bundle, *, precision: str, backend: str | None, on_cpu: bool) -> None:
    """Write configuration, labels and the Python that Triton runs beside the bundle in `VERSION`/`BUNDLE`.

    Args:
        directory: of the model; its name is the model's in Triton.
        backend: whose engines are packed; None: those of ONNX Runtime are built where the server first starts.
        on_cpu: serve it there, and not on a GPU.
    """
    network = bundle.network
    config = _CONFIG.format(
        max_batch=bundle.manifest.max_batch,
        image=IMAGE,
        logits=LOGITS,
        keep=KEEP,
        height=network.preprocessing.height,
        width=network.preprocessing.width,
        n_classes=network.n_classes,
        labels="" if network.labels is None else f', label_filename: "{_LABELS}"',
        n_blocks=network.n_blocks,
        kind="KIND_CPU" if on_cpu else "KIND_GPU",
        backend=backend or DEFAULT_BACKEND,
        precision=precision,
    )
    write_bytes(directory / "config.pbtxt", config.encode())
    write_bytes(directory / VERSION / "model.py", _MODEL.encode())
    if network.labels is not None:
        lines = (" ".join(label.split()) for label in network.labels)  # one a line, whatever a label has
        write_bytes(directory / _LABELS, "".join(f"{line}\n" for line in lines).encode())

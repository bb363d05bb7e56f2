"""ONNX models of all parts, traced together, against one trace for each structure.

python benchmarks/exports.py MODEL...
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bdtool.models.parts import network_spec, part_modules
from bdtool.models.shipped import shipped_models
from bdtool.models.store import load_model
from bdtool.specs import PartSpec
from export.onnx_model import OnnxExporter, fold_batch_norm

_ROUNDS = 3  # in turns; the fastest counts

Found = Sequence[tuple[torch.fx.GraphModule, PartSpec]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    print("| network | parts | one by one, s | together, s | ratio |\n|---|---|---|---|---|")
    for name in parser.parse_args().models:
        model = load_model(shipped_models().get(name, Path(name)))
        modules = part_modules(model)
        found = [(fold_batch_norm(modules[part.name]), part) for part in network_spec(model).parts]
        export_parts(found[:1], together=True)  # loads the exporter
        times = [(seconds(found, together=False), seconds(found, together=True)) for _ in range(_ROUNDS)]
        apart, together = (min(column) for column in zip(*times, strict=True))
        figures = f"{apart:.1f} | {together:.1f} | {together / apart:.2f}"
        print(f"| {model.spec.arch} | {len(found)} | {figures} |", flush=True)


def seconds(found: Found, *, together: bool) -> float:
    start = time.perf_counter()
    export_parts(found, together=together)
    return time.perf_counter() - start


def export_parts(found: Found, *, together: bool) -> None:
    exporter = OnnxExporter(found if together else ())
    for folded, part in found:
        exporter.onnx_from_module(folded, part)


if __name__ == "__main__":
    main()

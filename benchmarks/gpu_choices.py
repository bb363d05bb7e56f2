"""What the numbers and formats that a GPU runs with were chosen by: microseconds on the GPU that is here.

    python -m benchmarks.gpu_choices [--bundle BUNDLE] [--backend NAME] [--out FILE]

    one SWITCH for 1, 2, ... 9 blocks (`engines.cuda_graph.BLOCKS_PER_SWITCH`), beside graphs that know the path
    0, 1, ... 8 blocks of a path beside the policy network (`engines.speculation`), for a mask that begins with them and
    for another one
    a residual block of CIFAR's three widths in PyTorch: additions and ReLUs launched apart or fused with the
    convolutions (`engines.torch_fusion`), channels-last or NCHW (`engines.torch_onnx.memory_format`)
    copies of images to the device and back, waited for, from page-locked memory (`engines.cuda_buffer`) and other

Each is the mean of 50 launches, one after the other, between two events, the median of 5 such; a launch of a block is
20 of them in a row. Of copies, the host's median. Clocks are noted before and afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bdtool.profiling.environment import describe_gpu
from benchmarks.graph_bench import DEVICE, kept_masks, open_engines
from benchmarks.latency import make_bundle
from engines.cuda_buffer import DeviceBuffer
from engines.cuda_device import open_device
from engines.device_timer import DeviceTimer, timer_of
from engines.dispatch import runs
from engines.libcuda import driver_from_libcuda
from engines.network_graphs import NetworkGraphs
from engines.speculation import Speculation
from export.bundle import Bundle
from export.files import write_json

_SIZES = tuple(range(1, 10))
_WIDTHS = ((16, 32), (32, 16), (64, 8))  # channels, and height and width
_COPY_BYTES = (32 * 32 * 3, 224 * 224 * 3, 64 * 224 * 224 * 3)  # an image of CIFAR, one of ImageNet, a batch of those
_LAUNCHES, _SAMPLES = 50, 5
_WARM_UP_S = 0.2  # of each graph: a GPU that was idle takes that long to come to its clock
_BLOCKS = 20  # in one graph: a launch takes as long as some of them, and is no part of what is asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: a ResNet-110 with random weights, which is made")
    parser.add_argument("--backend", default="torch", help="whose engines are captured, default torch")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, as they come")
    args = parser.parse_args()
    gpu = describe_gpu(DEVICE)
    if not gpu:
        sys.exit(f"no GPU to measure: {driver_from_libcuda().error}. See `bdtool doctor`")
    with tempfile.TemporaryDirectory(prefix="bdtool-benchmark-") as directory:
        path = args.bundle or Path(directory) / "resnet110"
        if args.bundle is None:
            make_bundle(path)
        bundle = Bundle.open(path)
        parts: dict[str, Callable[[], Any]] = {
            "graphs_us": lambda: switch_sizes(bundle, args.backend),
            "begun_us": lambda: speculated(bundle, args.backend),
            "blocks_us": block_formats,
            "copies_us": host_copies,
        }
        figures: dict[str, Any] = {"gpu": gpu}
        for name, measure in parts.items():
            try:
                figures[name] = measure()
            except Exception as exc:  # of any library: the other parts are measured all the same
                figures[f"{name}, error"] = f"{type(exc).__name__}: {exc}"
            if args.out is not None:  # at once: time on a GPU is short, and may end
                write_json(args.out, figures)
            print(f"{time.strftime('%H:%M:%S')} {name} done", file=sys.stderr)
    figures["gpu_afterwards"] = describe_gpu(DEVICE)
    if args.out is not None:
        write_json(args.out, figures)
    print(json.dumps(figures, indent=2))
    if errors := [name for name in figures if name.endswith("error")]:
        sys.exit(f"not measured: {'; '.join(f'{name} {figures[name]}' for name in errors)}")


def switch_sizes(bundle: Bundle, backend: str, sizes: Sequence[int] = _SIZES) -> dict[str, Any]:
    """Return the times of the graph that decides, for each number of blocks a SWITCH, and of those that know."""
    network, library, engines = open_engines(bundle, backend)
    timer = timer_of(library)
    assert timer is not None
    masks = kept_masks(network.n_blocks)
    known = NetworkGraphs(network, library, engines)
    policy = known.policy()
    assert policy is not None
    found: dict[str, Any] = {f"known path, {name} kept": _us(timer, known.path(mask)) for name, mask in masks.items()}
    found |= {"policy": _us(timer, policy), "full": _us(timer, known.whole()), "switch": {}}
    for size in sizes:
        graphs = NetworkGraphs(network, library, engines, blocks_per_switch=size)
        start = time.perf_counter()
        call = graphs.deciding()
        row = {"build_s": time.perf_counter() - start}
        for name, mask in masks.items():
            graphs.force.write(np.where(mask, 1, 2).astype(np.uint8))
            row[f"{name} kept"] = _us(timer, call)
        found["switch"][size] = row
    return found


def speculated(bundle: Bundle, backend: str, most: int = 8) -> dict[int, dict[str, float]]:
    """Return times by the number of parts beside the policy network, which are the right and the wrong ones."""
    network, library, engines = open_engines(bundle, backend)
    timer = timer_of(library)
    assert timer is not None
    graphs, right = NetworkGraphs(network, library, engines), kept_masks(network.n_blocks)["some"]
    wrong = right ^ (np.arange(network.n_blocks) == 0)
    path, _ = runs(right.tolist(), [network.shortcut(k) is not None for k in range(network.n_blocks)])
    found: dict[int, dict[str, float]] = {}
    for n_begun in range(min(most, len(path)) + 1):
        call = graphs.deciding([right, wrong], Speculation(tuple(path[:n_begun])))
        found[n_begun] = {}
        for name, mask in (("right", right), ("wrong", wrong)):
            graphs.force.write(np.where(mask, 1, 2).astype(np.uint8))
            found[n_begun][name] = _us(timer, call)
    return found


def block_formats() -> dict[str, dict[str, list[float]]]:
    """Return the times of a block of each width, [apart, fused], by number format, memory layout and batch."""
    torch.backends.cudnn.allow_tf32 = False
    formats = {"channels-last": torch.channels_last, "NCHW": torch.contiguous_format}
    return {
        f"{str(dtype).removeprefix('torch.')}, {name}, batch {batch}": {
            f"{channels} channels": _block_us(batch, channels, size, dtype, order) for channels, size in _WIDTHS
        }
        for batch in (1, 64)
        for dtype in (torch.float32, torch.float16)
        for name, order in formats.items()
    }


def host_copies(sizes: Sequence[int] = _COPY_BYTES) -> dict[str, dict[str, float]]:
    """Return the median of a copy there and one back, the host waiting for each, by bytes and kind of host memory."""
    device, rng = open_device(DEVICE), np.random.default_rng(0)
    found = {}
    for n_bytes in sizes:
        # not zeros: fresh ones are all of them one page of the system's, which lies in the cache
        buffer, values = DeviceBuffer(device, (n_bytes,), "uint8"), rng.integers(0, 256, n_bytes, dtype=np.uint8)
        row: dict[str, Callable[[], object]] = {
            "page-locked, there": lambda buffer=buffer, values=values: buffer.write(values),
            "page-locked, back": buffer.read,
            "other, there": lambda buffer=buffer, values=values: device.upload(buffer.address, values),
            "other, back": lambda buffer=buffer, values=values: device.download(values, buffer.address),
        }
        found[str(n_bytes)] = {name: _waited_us(copy, device.synchronize) for name, copy in row.items()}
    return found


def _waited_us(copy: Callable[[], object], wait: Callable[[], None]) -> float:
    seconds = []
    for _ in range(_LAUNCHES):
        start = time.perf_counter()
        copy()
        wait()
        seconds.append(time.perf_counter() - start)
    return 1e6 * float(np.median(seconds))


def _block_us(batch: int, channels: int, size: int, dtype: torch.dtype, order: torch.memory_format) -> list[float]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)

    x = random(batch, channels, size, size).to(memory_format=order)
    weight = (0.1 * random(channels, channels, 3, 3)).to(memory_format=order)
    bias, y = random(channels), torch.empty_like(x)
    geometry = ((1, 1), (1, 1), (1, 1), 1)

    def apart() -> None:
        inner = torch.relu(F.conv2d(x, weight, bias, *geometry))
        y.copy_(torch.relu(F.conv2d(inner, weight, bias, *geometry) + x))

    def fused() -> None:
        inner = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        y.copy_(torch.cudnn_convolution_add_relu(inner, weight, x, 1.0, bias, *geometry))

    timer = DeviceTimer(lambda: torch.cuda.Event(enable_timing=True), torch.cuda.synchronize)  # type: ignore[no-untyped-call]
    return [_us(timer, _replayed(call)) / _BLOCKS for call in (apart, fused)]


def _replayed(call: Callable[[], None]) -> Callable[[], None]:
    """Return one launch of `_BLOCKS` times what `call` enqueues, which PyTorch alone would be too slow to enqueue."""
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(_BLOCKS):
                call()
    return graph.replay


def _us(timer: DeviceTimer, call: Callable[[], object]) -> float:
    def launches() -> None:
        for _ in range(_LAUNCHES):
            call()

    start, times_ms = time.perf_counter(), list[float]()
    while not times_ms or time.perf_counter() - start < _WARM_UP_S:
        timer.timed(launches, times_ms.append)()
        timer.collect()
    times_ms.clear()
    for _ in range(_SAMPLES):
        timer.timed(launches, times_ms.append)()
    timer.collect()
    return 1000 * float(np.median(times_ms)) / _LAUNCHES


if __name__ == "__main__":
    main()

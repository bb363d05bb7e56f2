"""What NVIDIA's Triton adds to an image's latency, and what batches of waiting requests bring.

    python benchmarks/serving.py BUNDLE --data test.npz

Needs the server of `make test`. One image a request, one thread for an engine, clients on the same machine by HTTP; the
runtime of this process and the server take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bdtool import Orchestrator
from bdtool.data.sources import open_data
from bdtool.packing import pack
from export.bundle import Bundle
from tests.triton_server import Connection, TritonServer, why_not

_N_IMAGES = 512
_BATCHES = "dynamic_batching { }\n"
_ONE_THREAD = 'parameters [\n  { key: "threads", value: { string_value: "1" } },\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1, help="of each way in a round")
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    bundle = Bundle.open(args.bundle)
    pixels = open_data(args.data, network=bundle.network, labels="optional").drawn(_N_IMAGES).take(_N_IMAGES).images
    with tempfile.TemporaryDirectory(prefix="bdtool-benchmark-") as directory:
        repository = Path(directory, "models")
        for name in ("together", "apart"):
            pack(bundle, repository / name, for_triton=True)
            config = repository / name / "config.pbtxt"
            text = config.read_text().replace("parameters [\n", _ONE_THREAD)
            config.write_text(text.replace(_BATCHES, "") if name == "apart" else text)
        with (
            TritonServer(repository, Path(directory, "server")) as server,
            Orchestrator.open(args.bundle, threads=1) as runtime,
        ):
            if not server.is_ready():
                parser.error(server.log)
            compare_latency(server, runtime, pixels, n_rounds=args.rounds, seconds=args.seconds)
            compare_throughput(server, pixels, n_clients=args.clients, n_rounds=args.rounds, seconds=args.seconds)


def compare_latency(
    server: TritonServer, runtime: Orchestrator, pixels: np.ndarray, *, n_rounds: int, seconds: float
) -> None:
    with Connection(server.port) as client:
        ways = {"runtime.run": runtime.run, "by Triton": lambda image: client.infer("apart", image)}
        medians = {name: [] for name in ways}
        for _ in range(n_rounds):
            for name, way in ways.items():
                medians[name].append(float(np.median(latencies_ms(way, pixels, seconds))))
    print("| one image, one client | ms, median of rounds | quartiles |\n|---|---|---|")
    for name, found in medians.items():
        low, middle, high = np.percentile(found, (25, 50, 75))
        print(f"| {name} | {middle:.3f} | {low:.3f}, {high:.3f} |")
    added = np.subtract(medians["by Triton"], medians["runtime.run"])
    print(f"\nadded: {np.median(added):.3f} ms\n")


def compare_throughput(
    server: TritonServer, pixels: np.ndarray, *, n_clients: int, n_rounds: int, seconds: float
) -> None:
    rates = {name: [] for name in ("apart", "together")}
    for _ in range(n_rounds):
        for name in rates:
            with ThreadPoolExecutor(n_clients) as pool:
                counts = pool.map(lambda _, name=name: n_answered(server, name, pixels, seconds), range(n_clients))
                rates[name].append(sum(counts) / seconds)
    ratio = np.median(np.divide(rates["together"], rates["apart"]))
    print(f"| {n_clients} clients | images/s, median of rounds |\n|---|---|")
    for name, found in rates.items():
        print(f"| requests run {name} | {np.median(found):.0f} |")
    print(f"\ntogether to apart: {ratio:.2f}")


def latencies_ms(way: Callable[[np.ndarray], object], pixels: np.ndarray, seconds: float) -> list[float]:
    """Run images one by one for that long, and return how long each took."""
    found: list[float] = []
    stop = time.perf_counter() + seconds
    while (start := time.perf_counter()) < stop:
        n = len(found) % len(pixels)
        way(pixels[n : n + 1])
        found.append((time.perf_counter() - start) * 1000)
    return found


def n_answered(server: TritonServer, model: str, pixels: np.ndarray, seconds: float) -> int:
    with Connection(server.port) as client:
        return len(latencies_ms(lambda image: client.infer(model, image), pixels, seconds))


if __name__ == "__main__":
    main()

"""The tables of a profile, from its JSON."""

from __future__ import annotations

from typing import Any

import click

from bdtool.cli.output import mega, print_table
from bdtool.words import counted, percent

_MIB = 2**20


def print_profile(data: dict[str, Any]) -> None:
    """Print a profile's JSON for people."""
    environment = data["environment"]
    machine = f"{environment['backend']}, {counted(environment['threads'], 'thread')}, {environment['cpu']}"
    named = f"{data['arch']}, {data['precision']}"
    click.echo(f"{data['bundle']}: {named}, {machine}, CPU affinity {environment['cpu_affinity']}")
    if "gpu" in environment:
        click.echo(_gpu_line(environment))
    click.echo(f"policy {data['policy']}; policy network: {data['policy_network']}")
    click.echo(f"input: {counted(data['n_images'], 'image')} of {data['input_source']}; batch {data['batch']}")
    click.echo(f"clock: {data['boundary']}")
    print_strategies(data["strategies"])
    for name, row in data["strategies"].items():
        if "cuda_graph" in row:
            hits = f"; {percent(row['hit_rate'])} of the images hit" if "hit_rate" in row else ""
            click.echo(f"{name}: CUDA graph {row['cuda_graph']['mode']} ({row['cuda_graph']['reason']}){hits}")
    for name, row in data["strategies"].items():
        if "paths" in row:
            _print_paths(name, row)
    if data["split"]["strategies"]:
        _print_split(data["split"])
    if data["latency_against_blocks"]:
        _print_lines(data["latency_against_blocks"], n_blocks=round(data["strategies"]["full"]["blocks_mean"]))
    if data["sweep"]:
        _print_sweep(data["sweep"])
    if data["parts"]:
        print_parts(data["parts"], batch=data["batch"])
    if data["peak_memory_mib"] is not None:
        click.echo(f"\npeak memory: {data['peak_memory_mib']:.0f} MiB, {data['peak_memory_boundary']}")
    if data["recommendation"]:
        _print_recommendation(data["recommendation"], is_recorded=data["recommendation_recorded"])


def _gpu_line(environment: dict[str, Any]) -> str:
    words = [f"GPU: {environment['gpu']}", f"compute capability {environment['gpu_compute_capability']}"]
    if "driver" in environment:
        words.append(f"driver {environment['driver']}")
    if "gpu_sm_mhz" in environment:
        before = environment.get("gpu_sm_mhz_before", "?")
        words.append(f"SM clock {before} MHz before, {environment['gpu_sm_mhz']} after")
    return ", ".join(words)


def print_strategies(strategies: dict[str, Any]) -> None:
    """Print the latency table of a profile's JSON."""
    percentiles = [name for name in strategies["full"]["latency_ms"] if name not in ("mean", "median")]
    columns = [
        "strategy",
        "median",
        "mean",
        *percentiles,
        "to full",
        "IQR",
        "FLOPs",
        "blocks",
        "images/s",
        "CoV",
        "requests",
    ]
    rows = []
    for name, s in strategies.items():
        latency = s["latency_ms"]
        variation = s["coefficient_of_variation"]
        rows.append(
            [
                name,
                *(_milliseconds(latency[column]) for column in ("median", "mean", *percentiles)),
                f"{s['ratio_to_full']:.3f}",
                _range(s["ratio_to_full_iqr"]),
                f"{s['flops_ratio_to_full']:.3f}",
                f"{s['blocks_mean']:.2f}",
                f"{s['throughput_ips']:.1f}",
                "-" if variation is None else percent(variation),
                str(s["n_requests"]),
            ]
        )
    title = (
        "Latency of one request, milliseconds (to full: median over rounds of the ratio of means; IQR: its quartiles)"
    )
    print_table(columns, rows, title=title)


def print_parts(parts: list[dict[str, Any]], *, batch: int = 1) -> None:
    """Print the per-part table of a profile's JSON."""
    enqueued = any(p.get("enqueue_ms") is not None for p in parts)
    host = ["us to enqueue"] if enqueued else []
    columns = ["part", "us a call", *host, "us an image", "calls", "usage", "share", "FLOPs"]
    rows = [
        [
            p["name"],
            f"{1000 * p['mean_ms']:.1f}",
            *([f"{1000 * p['enqueue_ms']:.1f}"] if enqueued else []),
            f"{1000 * p['ms_per_image']:.1f}",
            f"{p['calls']:.2f}",
            percent(p["usage"]),
            percent(p["share"]),
            mega(p["flops"]),
        ]
        for p in parts
    ]
    title = f"Engine calls of chain, batch {batch} (a pass of its own; calls of a request, usage by images)"
    print_table(columns, rows, title=title)


def _print_paths(name: str, path: dict[str, Any]) -> None:
    click.echo(
        f"{name}: {percent(path['hit_rate'])} of the images hit; {counted(path['paths'], 'engine')}, "
        f"{path['path_bytes'] / _MIB:.1f} of at most {path['path_bytes_bound'] / _MIB:.0f} MiB; "
        f"masks {path['path_masks']}"
    )


def _print_split(split: dict[str, Any]) -> None:
    strategies = split["strategies"]
    columns = list(dict.fromkeys(name for row in strategies.values() for name in row["components"]))
    columns.sort(key=lambda name: name == "dispatch")  # what is left comes last
    rows = []
    for name, row in strategies.items():
        found = [row["components"].get(column) for column in columns]
        cells = ["-" if c is None else f"{c['ms']:.3f} ({percent(c['share'], 0)})" for c in found]
        rows.append([name, *cells, f"{row['total_ms']:.3f}", _range(row["total_ms_iqr"])])
    print_table(["strategy", *columns, "total", "IQR"], rows, title="Where the time goes, milliseconds an image")
    click.echo(split["pass"])
    _print_device({name: row["device"] for name, row in strategies.items() if row.get("device")})


def _print_device(rows: dict[str, Any]) -> None:
    """Print what trtexec calls its performance summary; nothing where engine calls are done when they return."""
    if not rows:
        return
    columns = ["strategy", "H2D", "compute", "D2H", "enqueue", "host", "compute CoV"]
    cells = []
    for name, row in rows.items():
        variation = row["compute_coefficient_of_variation"]
        medians = [f"{row[f'{part}_ms']['median']:.3f}" for part in ("h2d", "compute", "d2h", "enqueue", "host")]
        cells.append([name, *medians, "-" if variation is None else percent(variation)])
    title = (
        "On the device, median milliseconds a request (H2D, compute, D2H by events; enqueue, host by the host's clock)"
    )
    print_table(columns, cells, title=title)


def _print_lines(lines: dict[str, Any], *, n_blocks: int) -> None:
    rows = [
        [
            name,
            f"{line['fixed_ms']:.3f}",
            f"{line['per_block_ms']:.4f}",
            _break_even(line["break_even_blocks"], n_blocks),
            line["against"],
            "-" if line["r_squared"] is None else f"{line['r_squared']:.3f}",
            str(line["n_requests"]),
        ]
        for name, line in lines.items()
    ]
    columns = ["strategy", "fixed ms", "ms a block", "break-even blocks", "against", "R^2", "requests"]
    print_table(columns, rows, title="Latency of a request against blocks run")
    click.echo(_break_even_note(lines, n_blocks))
    if odd := [name for name, line in lines.items() if line["fixed_ms"] < 0]:
        click.echo(f"{', '.join(odd)}: no cost is below 0; noise bends the line, so take its break-even with care")
    for points in dict.fromkeys(line["points"] for line in lines.values()):
        names = [name for name, line in lines.items() if line["points"] == points]
        click.echo(f"{', '.join(names)}: {points}")


def _break_even(blocks: float | None, n_blocks: int) -> str:
    if blocks is None:
        return "-"
    if 0 < blocks < n_blocks:
        return f"{blocks:.1f}"
    return "never" if blocks <= 0 else "always"


def _break_even_note(lines: dict[str, Any], n_blocks: int) -> str:
    """Say which static network each strategy is faster than below its break-even point, and what the words mean."""
    names: dict[str, list[str]] = {}
    for name, line in lines.items():
        names.setdefault(line["against"], []).append(name)
    compared = "; ".join(f"{', '.join(some)} against `{full}`" for full, some in names.items())
    return f"break-even: {compared} (always: faster even with all {n_blocks} blocks; never: slower even with none)"


def _print_sweep(sweep: dict[str, Any]) -> None:
    rows = [
        [
            name,
            batch,
            f"{row['throughput_ips']:.1f}",
            f"{row['latency_ms']['mean'] / int(batch):.3f}",
            f"{row['ratio_to_full']:.3f}",
            _range(row["ratio_to_full_iqr"]),
            f"{row['flops_ratio_to_full']:.3f}",
            str(row["n_requests"]),
        ]
        for batch, strategies in sweep.items()
        for name, row in strategies.items()
    ]
    columns = ["strategy", "batch", "images/s", "ms an image", "to full", "IQR", "FLOPs", "requests"]
    print_table(columns, rows, title="Throughput by batch, each batch in alternating rounds of its own")


def _print_recommendation(recommendation: dict[str, Any], *, is_recorded: bool) -> None:
    ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in recommendation["ratios_to_full"].items())
    taken = "strategy 'auto' now takes it with as many threads"
    if recommendation["batch"] > 1:
        taken += ", where no smaller batch is recorded"
    click.echo(
        f"\nrecommended: {recommendation['strategy']} (to full at batch {recommendation['batch']}, "
        f"{counted(recommendation['threads'], 'thread')}, policy {recommendation['policy']}: {ratios})"
        f"; {taken if is_recorded else 'it was not recorded'}"
    )


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"  # a percentile that so few requests do not hold


def _range(quartiles: list[float] | None) -> str:
    return "-" if quartiles is None else f"{quartiles[0]:.3f}-{quartiles[1]:.3f}"

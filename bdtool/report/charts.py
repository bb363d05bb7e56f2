"""The charts of a report, as plotly figures with a text that says the same. No measuring here."""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from bdtool import words
from bdtool.report.data import OperatingPoint, ReportData, StrategyLatency

# Each has a contrast of at least 3:1 on the page's light and on its dark background.
_BLUE, _ORANGE, _GREEN, _PINK, _PURPLE = "#2f7ed8", "#d9730d", "#2a9d5c", "#c2559d", "#7d6be0"
_COLOURS = (_BLUE, _ORANGE, _GREEN, _PINK, _PURPLE)
_GREY = "#808690"  # what ours is compared with
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_N_CURVE = 200  # points of a distribution's curve
_LONGEST_NAME = 32
_MAX_DOTS = 1500  # requests drawn; the figures in the text hold all


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, or only its text where there is nothing to draw."""

    name: str
    title: str
    text: str
    figure: str | None = None  # plotly's JSON


def latency_distribution(data: ReportData) -> Chart:
    """Return the cumulative distribution of each strategy's latency."""
    figure = go.Figure()
    shares = np.linspace(0, 1, _N_CURVE)
    for i, strategy in enumerate(data.strategies):
        figure.add_scatter(
            x=np.quantile(strategy.latency_ms, shares),
            y=100 * shares,
            mode="lines",
            name=html.escape(strategy.name),
            line={"color": _COLOURS[i % len(_COLOURS)], "width": 2.5},
            hovertemplate="%{y:.0f} % took at most %{x:.3f} ms",
        )
    # cut off a long tail, however few requests there are: a place to end the axis, no figure of the report
    end_ms = max(float(np.quantile(strategy.latency_ms, 0.99)) for strategy in data.strategies)
    figure.update_xaxes(title="latency of one image, ms", range=[0, 1.05 * end_ms])
    figure.update_yaxes(title="images at most as slow, %", range=[0, 101])
    quantiles = "; ".join(map(_quantiles, data.strategies))
    text = f"{quantiles}. The axis ends just above {words.milliseconds(end_ms)}."
    return _chart("latency-distribution", "Latency distribution", text, figure)


def _quantiles(strategy: StrategyLatency) -> str:
    """Say the median, and within what most images took, where that many were timed."""
    named = {"median": "median", "p90": "90 % within", "p99": "99 % within"}
    values = {text: strategy.summary_ms[name] for name, text in named.items()}
    said = [f"{text} {words.milliseconds(value)}" for text, value in values.items() if value is not None]
    return f"{strategy.name}: {', '.join(said)}"


def latency_against_blocks(data: ReportData) -> Chart:
    """Return the latency of requests against the blocks they ran, with the fitted line and the level of `full`."""
    title, dynamic, line = "Latency against blocks run", data.dynamic, data.line
    if line is None:
        counts = sorted(set(dynamic.blocks_run))
        if len(counts) == 1:
            why = f"Every timed image ran {words.blocks(counts[0])}, so there is no line to fit."
        else:
            numbers = ", ".join(f"{count:g}" for count in counts)
            why = (
                f"The timed images ran {numbers} blocks: too few numbers, or images of each, or too close together "
                "for a line."
            )
        text = f"{why} Try a policy that varies from image to image."
        return Chart(name="latency-blocks", title=title, text=text)
    full_ms = data.full.median_ms
    drawn = np.linspace(0, len(dynamic.latency_ms) - 1, min(_MAX_DOTS, len(dynamic.latency_ms))).astype(int)
    latency_ms, blocks = np.array(dynamic.latency_ms), np.array(dynamic.blocks_run)
    ends = np.array([0.0, data.n_blocks])
    figure = go.Figure()
    figure.add_scatter(
        x=blocks[drawn],
        y=latency_ms[drawn],
        mode="markers",
        name=f"one image, {html.escape(dynamic.name)}",
        marker={"color": _BLUE, "size": 6, "opacity": 0.5},
        hovertemplate="%{x} blocks, %{y:.3f} ms<extra></extra>",
    )
    fitted = line.fixed_ms + line.per_block_ms * ends
    figure.add_scatter(x=ends, y=fitted, mode="lines", name="fitted line", line={"color": _ORANGE, "width": 2.5})
    figure.add_scatter(
        x=ends,
        y=[full_ms, full_ms],
        mode="lines",
        name="median of full",
        line={"color": _GREY, "width": 2, "dash": "dash"},
    )
    highest = max(float(np.quantile(latency_ms, 0.99)), full_ms, float(fitted.max()))
    figure.update_xaxes(title="blocks run", range=[-0.5, data.n_blocks + 0.5])
    figure.update_yaxes(title="latency of one image, ms", range=[0, 1.1 * highest])
    text = (
        f"Fixed cost {words.milliseconds(line.fixed_ms)}, plus {words.milliseconds(line.per_block_ms)} for each block; "
        f"full takes {words.milliseconds(full_ms)}. {_break_even(data.n_blocks, line.break_even_blocks)}"
    )
    if line.fixed_ms < 0:
        text += " No cost is below 0: noise bends the line, so take its break-even with care."
    return _chart("latency-blocks", title, text, figure)


def _break_even(n_blocks: int, break_even_blocks: float | None) -> str:
    if break_even_blocks is None:
        return "The fitted cost of a block is not above zero: the measurement is too noisy for a break-even point."
    if break_even_blocks >= n_blocks:
        return f"On the fitted line an image is faster than full even with all {n_blocks} blocks."
    if break_even_blocks <= 0:
        return "On the fitted line no image is faster than full, however few blocks it runs."
    return f"Break-even: an image is faster than full when it runs fewer than {break_even_blocks:.1f} blocks."


def accuracy_against_flops(data: ReportData) -> Chart:
    """Return each policy's accuracy and FLOPs, the paper's results beside ours."""
    figure = go.Figure(layout={"height": 460})  # its legend is long
    curve = sorted((point for point in data.points if point.threshold is not None), key=_threshold)
    if len(curve) > 1:
        figure.add_scatter(
            x=[(point.flops_mean or 0) / 1e6 for point in curve],
            y=[100 * point.accuracy for point in curve],
            text=[f"threshold {point.threshold:g}" for point in curve],
            mode="lines+markers",
            name="other thresholds",
            line={"color": _COLOURS[0], "width": 2},
            marker={"size": 7},
            hovertemplate="%{text}: %{y:.2f} % at %{x:.1f} MFLOPs",
        )
    others = [point for point in data.points[1:] if point.threshold is None]
    drawn = [point for point in (*data.points[:1], *others, *data.paper_points) if point.flops_mean is not None]
    for i, point in enumerate(drawn):
        is_paper = point in data.paper_points
        figure.add_scatter(
            x=[(point.flops_mean or 0) / 1e6],
            y=[100 * point.accuracy],
            mode="markers",
            name=html.escape(_short(point.name)),
            marker={
                "symbol": "star" if is_paper else _SYMBOLS[i % len(_SYMBOLS)],
                "size": 16 if is_paper else 13,
                "color": _GREY if is_paper else _COLOURS[i % len(_COLOURS)],
            },
            hovertemplate="%{y:.2f} % at %{x:.1f} MFLOPs",
        )
    figure.update_xaxes(title="FLOPs of one image, millions", rangemode="tozero")
    figure.update_yaxes(title="accuracy, %")
    text = "; ".join(_said(point) for point in (*data.points, *data.paper_points)) + "."
    if data.paper_points:
        text += (
            " Stars are the paper's own results, with its trained policies and its test set; they compare with ours "
            "only where the data set is the same."
        )
    return _chart("accuracy-flops", "Accuracy against FLOPs", text, figure)


def _threshold(point: OperatingPoint) -> float:
    return point.threshold or 0.0


def _short(name: str) -> str:
    """Return the end of a long name, such as a path: a legend must fit on a phone."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME:]


def _said(point: OperatingPoint) -> str:
    cost = "FLOPs not printed, not drawn" if point.flops_mean is None else words.flops(point.flops_mean)
    return f"{point.name}: {words.percent(point.accuracy)}, {words.blocks(round(point.blocks_mean, 2))}, {cost}"


def block_usage(data: ReportData) -> Chart:
    """Return the share of images that keep each block."""
    title, usage = "How often each block runs", np.array(data.usage)
    if data.common_bits is not None:
        return Chart(name="block-usage", title=title, text=_same_blocks(data))
    stages = _stage_of_blocks(data)
    figure = go.Figure()
    for stage in range(len(data.stages)):
        inside = stages == stage
        figure.add_bar(
            x=np.flatnonzero(inside),
            y=100 * usage[inside],
            name=f"stage {stage + 1}",
            marker={"color": _COLOURS[stage % len(_COLOURS)]},
            hovertemplate="block %{x}: kept for %{y:.1f} %",
        )
    figure.update_xaxes(title="block", **_block_ticks(data.n_blocks))
    figure.update_yaxes(title="images that keep it, %", range=[0, 100])
    figure.update_layout(bargap=0.15)
    most, least = int(usage.argmax()), int(usage.argmin())
    by_stage = ", ".join(
        f"stage {stage + 1} {words.percent(float(usage[stages == stage].mean()))}" for stage in range(len(data.stages))
    )
    text = (
        f"Kept most often: block {most} ({words.percent(usage[most])} of images); least: block {least} "
        f"({words.percent(usage[least])}). On average {by_stage}. The cost table below has every block's share."
    )
    return _chart("block-usage", title, text, figure)


def class_usage(data: ReportData) -> Chart:
    """Return the share of each class's images that keep each block, as a heat map."""
    title, name = "How often each block runs, by class", "class-usage"
    if data.common_bits is not None:
        return Chart(name=name, title=title, text=_same_blocks(data))
    usage = np.array([one.usage for one in data.classes])
    labels = _distinct([html.escape(one.label) for one in data.classes])
    figure = go.Figure(
        go.Heatmap(
            z=np.round(100 * usage, 1),
            y=labels,
            x=np.arange(data.n_blocks),
            zmin=0,
            zmax=100,
            colorscale="Cividis",
            colorbar={"title": {"text": "%"}, "thickness": 12, "len": 0.9},
            hovertemplate="%{y}, block %{x}: kept for %{z:.1f} %<extra></extra>",
        )
    )
    figure.update_xaxes(title="block", **_block_ticks(data.n_blocks))
    figure.update_yaxes(autorange="reversed", type="category", ticks="")
    figure.update_layout(height=min(1000, max(260, 140 + 26 * len(labels))))
    return _chart(name, title, _class_differences(data, usage), figure)


def _class_differences(data: ReportData, usage: np.ndarray) -> str:
    if len(usage) == 1:
        return f"All images are of one class, {data.classes[0].label}."
    spread = usage.max(axis=0) - usage.min(axis=0)
    widest = int(spread.argmax())
    high, low = int(usage[:, widest].argmax()), int(usage[:, widest].argmin())
    return (
        f"Classes differ most on block {widest}: {data.classes[high].label} keeps it for "
        f"{words.percent(usage[high, widest])} of its images, {data.classes[low].label} for "
        f"{words.percent(usage[low, widest])}. Over all blocks the highest and the lowest class lie "
        f"{100 * spread.mean():.1f} percentage points apart on average."
    )


def _distinct(labels: list[str]) -> list[str]:
    """Return labels that differ: a category axis would draw two classes of one name (ImageNet's cranes) as one row."""
    times = Counter(labels)
    return [f"{label} ({i})" if times[label] > 1 else label for i, label in enumerate(labels)]


def part_costs(data: ReportData) -> Chart:
    """Return how the engines' time divides over the network's parts."""
    title = "Where the time goes"
    timed = [part for part in data.parts if part.share is not None]
    if not timed:
        return Chart(name="part-costs", title=title, text="No part was timed alone: the profile did not run chain.")
    figure = go.Figure()
    for i, kind in enumerate(dict.fromkeys(part.kind for part in timed)):
        chosen = [part for part in timed if part.kind == kind]
        figure.add_bar(
            x=[part.name for part in chosen],
            y=[100 * (part.share or 0) for part in chosen],
            name=kind,
            marker={"color": _COLOURS[i % len(_COLOURS)]},
            hovertemplate="%{x}: %{y:.1f} % of engine time",
        )
    names = [part.name for part in timed]
    figure.update_xaxes(title="part", categoryorder="array", categoryarray=names, tickangle=-90)
    figure.update_yaxes(title="share of engine time, %", rangemode="tozero")
    kinds: dict[str, float] = {}
    for part in timed:
        kinds[part.kind] = kinds.get(part.kind, 0) + (part.share or 0)
    text = "Engine time by kind of part: " + ", ".join(f"{k} {words.percent(s)}" for k, s in kinds.items()) + "."
    return _chart("part-costs", title, text, figure)


def _same_blocks(data: ReportData) -> str:
    bits = data.common_bits or ""
    kept = [str(k) for k, bit in enumerate(bits) if bit == "1"]
    which = ", ".join(kept) if 0 < len(kept) < len(bits) else ("all of them" if kept else "none of them")
    return f"All {data.n_images} images ran the same blocks: {which}. There is nothing to compare."


def _stage_of_blocks(data: ReportData) -> np.ndarray:
    return np.repeat(np.arange(len(data.stages)), data.stages)


def _block_ticks(n_blocks: int) -> dict[str, Any]:
    return {"tickmode": "linear", "tick0": 0, "dtick": 1 if n_blocks <= 10 else 2 if n_blocks <= 20 else 5}


def _chart(name: str, title: str, text: str, figure: go.Figure) -> Chart:
    figure.update_layout(
        template="none",  # the page's script sets colours and fonts, for light and dark alike
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        dragmode=False,  # a finger on a chart scrolls the page
        hovermode="closest",
    )
    figure.update_xaxes(automargin=True, fixedrange=True)
    figure.update_yaxes(automargin=True, fixedrange=True)
    if figure.layout.height is None:
        figure.update_layout(height=380)
    return Chart(name=name, title=title, text=text, figure=figure.to_json())

"""Commands that classify and measure: run, evaluate, profile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bdtool.cli.command import Command, command_line
from bdtool.cli.options import (
    BUNDLE,
    IMAGE,
    MODEL_OR_BUNDLE,
    NEW_FILE,
    FiniteRange,
    NumberList,
    data_option,
    json_option,
    place_options,
    policies_option,
    policy_option,
    resize_option,
)
from bdtool.cli.output import emit, mega, print_table, progress, progress_of_share, tell_when_stopped, warn
from bdtool.words import counted, percent

if TYPE_CHECKING:
    from bdtool.evaluation import Evaluation
    from bdtool.runtime.place import Place


@click.command("run", cls=Command)
@click.argument("bundle", type=BUNDLE)
@click.argument("images", type=IMAGE, nargs=-1, required=True)
@policy_option
@click.option(
    "--strategy",
    default="chain",
    show_default=True,
    help="How blocks run: chain, path, fused, graph, full, or auto (what `bdtool profile --strategy auto` recorded).",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="Show the K most probable labels.",
)
@resize_option
@place_options(graphs=True)
@json_option
def run_cmd(
    bundle: Path,
    images: tuple[Path, ...],
    policy: str | None,
    strategy: str,
    top: int,
    resize: bool,
    place: Place,
    json_file: str | None,
) -> None:
    """Classify image files with a BUNDLE, and show which blocks each of them ran.

    Files that cannot be read are named on stderr, and the exit status is then 1; the others are classified.

    \b
    Example:
      bdtool run bundle cat.png dog.png
      bdtool run bundle cat.png --top 5
    """
    from bdtool.inference import classify_files
    from bdtool.runtime.thresholds import threshold_of
    from export.bundle import Bundle

    opened = Bundle.open(bundle).with_threshold(threshold_of(policy))
    with place.open(opened, strategy) as runtime:
        found = classify_files(runtime, images, policy=policy, resize=resize, top=top)
        choice = runtime.graph_choice

    def text() -> None:
        columns = ["image", "label", "probability", "blocks_run", "policy"]
        if found.answers:
            print_table(columns, [line for row in found.answers for line in _lines_of(row)])
        if choice is not None:
            click.echo(f"CUDA graph: {choice.mode} ({choice.reason})")

    result: dict[str, Any] = {"images": found.answers}
    if found.refused:
        result["refused"] = [{"image": file, "message": message} for file, message in found.refused.items()]
    if choice is not None:
        result["cuda_graph"] = asdict(choice)
    emit(result, json_file, text)
    for message in found.refused.values():
        click.echo(f"Error: {message}", err=True)
    if found.refused:
        raise click.exceptions.Exit(1)


def _lines_of(row: dict[str, Any]) -> Iterator[list[str]]:
    """Yield an image's line of the table, and one for each further label."""
    yield [row["image"], row["label"], percent(row["probability"]), str(row["blocks_run"]), row["policy"]]
    for other in row.get("top", ())[1:]:
        yield ["", other["label"], percent(other["probability"]), "", ""]


@click.command("evaluate", cls=Command)
@click.argument("model_or_bundle", type=MODEL_OR_BUNDLE)
@data_option()
@policies_option
@click.option("--limit", type=click.IntRange(min=1), help="Only N images, drawn with seed 0. Default: all.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time.")
@resize_option
@place_options()
@json_option
def evaluate_cmd(
    model_or_bundle: Path,
    data: str,
    policies: tuple[str, ...],
    limit: int | None,
    batch: int,
    resize: bool,
    place: Place,
    json_file: str | None,
) -> None:
    """Measure accuracy and cost on labelled images: a MODEL through PyTorch, a BUNDLE through its engines.

    \b
    Example:
      bdtool evaluate bundle --data cifar10:data --policy distribute:7
      bdtool evaluate bundle --data cifar10:data --policy learned:0.3 --policy learned --policy learned:0.7
    """
    from bdtool.data.sources import open_data
    from bdtool.evaluation import evaluate, open_classifier, require_policies
    from bdtool.runtime.thresholds import threshold_of

    asked = policies or (None,)
    results: list[Evaluation] = []
    source = None
    for threshold, group in groupby(asked, key=threshold_of):
        with open_classifier(model_or_bundle, place, threshold=threshold) as classifier:
            if source is None:
                require_policies(classifier.network, asked)
                source = open_data(data, network=classifier.network, resize=resize).drawn(limit)
            for policy in group:
                step = f"evaluating {policy}" if len(asked) > 1 else "evaluating"
                with progress(step, source.n_images) as advance:
                    results.append(evaluate(classifier, source, policy=policy, batch_size=batch, on_batch=advance))
    if len(results) == 1:
        emit(asdict(results[0]), json_file, lambda: _print_evaluation(results[0]))
    else:
        emit({"policies": [asdict(one) for one in results]}, json_file, lambda: _print_evaluations(results))


@click.command("profile", cls=Command)
@click.argument("bundle", type=BUNDLE)
@data_option(default="Default: synthetic pictures, labelled as such in the result.")
@policy_option
@click.option(
    "--strategy",
    default="chain",
    show_default=True,
    metavar="S,...",
    help="Strategies to measure: chain, path, fused, graph; auto measures all that are there and records the fastest. "
    "chain@int8, full@fp16 and the like measure one in another precision, full@MODE and graph@MODE in one CUDA graph "
    "mode (see --cuda-graph), beside the others.",
)
@click.option("--baseline", type=BUNDLE, help="Another bundle, whose static ResNet is measured as full:<arch>.")
@click.option("--sweep", is_flag=True, help="Measure throughput at batch 1, 8, 32 and 64 as well.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images of one request.")
@click.option(
    "--warmup",
    type=FiniteRange(min=0),
    default=200,
    show_default=True,
    help="Milliseconds a strategy, and at least the requests of a round; 0: one request of each strategy.",
)
@click.option(
    "--duration",
    type=FiniteRange(min=0, min_open=True),
    default=3,
    show_default=True,
    help="Seconds measured, at least, for each strategy; the shortest run is four rounds of 5 images.",
)
@click.option(
    "--percentile",
    type=NumberList(low=0, high=100),
    default="90,95,99",
    show_default=True,
    metavar="LIST",
    help="Percentiles to report; those that too few requests hold are null (p99 takes 100).",
)
@resize_option
@place_options(graphs=True)
@click.option(
    "--html",
    "html_file",
    type=NEW_FILE,
    metavar="FILE",
    help="Also write the page of `bdtool report`, which needs the same extra.",
)
@json_option
def profile_cmd(
    bundle: Path,
    data: str | None,
    policy: str | None,
    strategy: str,
    baseline: Path | None,
    sweep: bool,
    batch: int,
    warmup: float,
    duration: float,
    percentile: tuple[float, ...],
    resize: bool,
    place: Place,
    html_file: Path | None,
    json_file: str | None,
) -> None:
    """Measure latency for each image, strategies side by side in one run, always beside the `full` baseline.

    512 images, drawn from DATA with seed 0, are run again and again. The strategies take turns, some 50 images at a
    time (a round; fewer where they take longer than a quarter of the duration), so that a busy machine slows them
    alike; compare the ratios, each the median over rounds of the ratio of mean latencies.

    \b
    Example:
      bdtool profile bundle --data cifar10:data --policy distribute:7 --threads 1
      bdtool profile bundle --data cifar10:data --strategy auto --sweep --json profile.json
      bdtool profile bundle --data cifar10:data --strategy full@int8,chain,chain@int8
      bdtool profile bundle --backend torch --device cuda:0 --strategy full@off,chain,graph,graph@path-cache
    """
    from bdtool.cli.profile_tables import print_profile
    from bdtool.data.sources import open_data
    from bdtool.profiling.profile import SWEEP, profile
    from bdtool.profiling.workload import Settings
    from export.bundle import Bundle

    strategies = [name.strip() for name in strategy.split(",")]
    if html_file is not None:
        _require_page(batch, strategies)
    opened = Bundle.open(bundle)
    source = open_data(data or "synthetic", network=opened.network, resize=resize, labels="optional")
    settings = Settings(batch=batch, warmup_ms=warmup, duration_s=duration, percentiles=percentile)
    stopped = "stopped before the end: no figures were kept; engines that were built are"
    with tell_when_stopped(lambda: stopped), progress_of_share("profiling") as on_progress:
        result = profile(
            opened,
            source,
            policy=policy,
            strategies=strategies,
            settings=settings,
            place=place,
            baseline=None if baseline is None else Bundle.open(baseline),
            sweep=SWEEP if sweep else (),
            on_progress=on_progress,
        )
    for message in result.warnings:
        warn(message)
    figures = result.to_json()
    emit(figures, json_file, lambda: print_profile(figures))
    if html_file is not None:
        from bdtool.cli.report import write_page
        from bdtool.report.request import ReportRequest

        request = ReportRequest(
            made_by=command_line(),
            by_profile=True,
            bundle=bundle,
            data=data or "synthetic",
            output=html_file,
            policy=policy,
            duration_s=duration,
            resize=resize,
            place=place,
        )
        page = write_page(result, opened, source.drawn(request.limit), request)
        click.echo(page, err=json_file == "-")


def _require_page(batch: int, strategies: list[str]) -> None:
    """Refuse what the page cannot show before anything is measured."""
    from bdtool.report.page import require_extra

    require_extra()
    if batch != 1 or not {"chain", "auto"} & set(strategies):
        raise click.UsageError("--html shows single images through the chain: use --batch 1, and chain in --strategy")


def _print_evaluations(results: list[Evaluation]) -> None:
    rows = [
        [
            one.policy,
            percent(one.accuracy, 2),
            *([] if one.accuracy_top5 is None else [percent(one.accuracy_top5, 2)]),
            f"{one.blocks_mean:.2f} ± {one.blocks_std:.2f}",
            f"{mega(one.flops_mean)} ± {mega(one.flops_std)}",
            percent(one.flops_mean / one.full_flops),
            str(one.unique_policies),
        ]
        for one in results
    ]
    top5 = [] if results[0].accuracy_top5 is None else ["top-5"]
    columns = ["policy", "accuracy", *top5, "blocks", "FLOPs an image", "of the full network", "unique policies"]
    click.echo(f"{counted(results[0].n_images, 'image')} of {results[0].input_source}")
    print_table(columns, rows)


def _print_evaluation(result: Evaluation) -> None:
    click.echo(f"{counted(result.n_images, 'image')} of {result.input_source}, policy {result.policy}")
    click.echo(f"accuracy         {percent(result.accuracy, 2)}")
    if result.accuracy_top5 is not None:
        click.echo(f"top-5 accuracy   {percent(result.accuracy_top5, 2)}")
    click.echo(f"blocks           {result.blocks_mean:.2f} ± {result.blocks_std:.2f}")
    share = percent(result.flops_mean / result.full_flops)
    click.echo(f"FLOPs an image   {mega(result.flops_mean)} ± {mega(result.flops_std)} ({share} of the full network)")
    click.echo(f"unique policies  {result.unique_policies}")

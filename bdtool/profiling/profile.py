"""`bdtool profile`: a bundle's strategies against its `full` baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from bdtool.data.batches import ImageSource
from bdtool.errors import UsageError
from bdtool.profiling.device_times import device_warnings
from bdtool.profiling.environment import clock_warnings, describe_environment, describe_gpu
from bdtool.profiling.instrumented import InstrumentedPass, run_instrumented
from bdtool.profiling.line import fit_lines
from bdtool.profiling.measure import measure
from bdtool.profiling.memory import peak_memory_mib
from bdtool.profiling.opening import Opened, open_all, require_batch, strategy_names
from bdtool.profiling.recommending import recommend, record
from bdtool.profiling.result import Profile
from bdtool.profiling.stability import stability_warnings
from bdtool.profiling.statistics import Samples
from bdtool.profiling.workload import BASELINE, Settings, Workload, contender_of, is_static
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from bdtool.runtime.policies import parse_policy_for
from bdtool.runtime.recommendation import AUTO
from bdtool.runtime.thresholds import threshold_of
from engines.graph_modes import OFF, GraphChoice
from engines.registry import identify_backend
from export.bundle import Bundle

MAX_IMAGES = 512  # how many different images are cycled through
SWEEP = (1, 8, 32, 64)
_CHANGING = ("gpu_sm_mhz", "gpu_memory_mhz", "gpu_temperature_c")  # read before the latency rounds and after them


def profile(
    bundle: Bundle,
    data: ImageSource,
    *,
    policy: str | None,
    strategies: Sequence[str],
    settings: Settings,
    place: Place,
    baseline: Bundle | None = None,
    sweep: Sequence[int] = (),
    on_progress: Callable[[float], None] = lambda share_done: None,
) -> Profile:
    """Measure `strategies` and the baseline `full` on images drawn from `data`, in one run.

    Args:
        strategies: names; "auto" stands for all that take a policy, and records the fastest beside the engines;
            "chain@int8", "full@off" and the like are the same strategy in another precision or CUDA graph mode.
        baseline: another static ResNet, whose `full` engine takes turns under the name `full:<arch>`.
        sweep: batch sizes whose throughput is measured as well.

    Raises:
        PolicyError: the policy does not fit the network.
        UsageError: an unknown strategy or backend, a baseline for images of another size, or a batch that bundle or
            engines were not made for.
        BackendError: the engines cannot be built, or backend, device or threads are not to be had.
    """
    require_batch(settings.batch, [bundle] if baseline is None else [bundle, baseline])
    bundle = bundle.with_threshold(threshold_of(policy))
    network = bundle.network
    request = parse_policy_for(network, policy)
    data = data.drawn(MAX_IMAGES)
    batch = data.take(MAX_IMAGES)
    images = batch.images
    workload = Workload(images=images, keep=request.given_at(batch.rows))
    names = strategy_names(strategies, network, place)
    with ExitStack() as stack:
        opened = open_all(bundle, names, workload, place, stack, baseline=baseline)
        batches = _batches(settings.batch, sweep, opened)
        steps = _Steps(2 + len(batches), on_progress)
        before = describe_gpu(place.device)
        samples = measure(opened.runtimes, workload, settings, on_round=steps.share)
        gpu = describe_gpu(place.device)
        peak_mib, paths, graphs = peak_memory_mib(), opened.path_figures(), opened.graph_choices()
        steps.next()
        passes = _instrumented(opened, workload, settings)
        lines = fit_lines(opened.of_bundle, samples, workload, settings, on_round=steps.share)
        steps.next()
        swept = _sweep(opened.runtimes, workload, settings, batches, steps)
        n_threads = opened.runtimes[BASELINE].threads
    splits = {name: one.split() for name, one in passes.items()}
    on_device = {name: row["device"] for name, row in splits.items() if row["device"] is not None}
    result = Profile(
        bundle=bundle.path.resolve().name,  # of ".", too
        arch=network.arch,
        policy=request.name,
        policy_network=_policy_network(network.has_policy, request.is_learned),
        precision=place.precision,
        settings=settings,
        n_images=len(images),
        input_source=data.description,
        is_real_input=data.is_real,
        images_sha256=workload.images_sha256,
        keep_sha256=workload.keep_sha256,
        weights_sha256=bundle.manifest.weights_sha256,
        samples=samples,
        parts=passes["chain"].parts() if "chain" in passes else [],
        warnings=[
            *_input_warnings(data, request.is_learned),
            *opened.mask_warnings(),
            *stability_warnings(samples),
            *device_warnings(on_device),
            *_baseline_warnings(graphs),
            *clock_warnings(gpu),
            *_sweep_warnings(sweep, opened),
        ],
        environment=_environment(place, n_threads, gpu, before=before),
        splits=splits,
        lines=lines,
        sweep=swept,
        paths=paths,
        graphs=graphs,
        peak_memory_mib=peak_mib,
    )
    return _recommended(result, bundle, place.store(bundle).directory) if AUTO in strategies else result


def _environment(
    place: Place, n_threads: int, gpu: dict[str, str | int | float], *, before: dict[str, str | int | float]
) -> dict[str, str | int | float]:
    """Return where the figures come from: the GPU as it was after the latency rounds, and what had been `before`."""
    version = identify_backend(place.backend, place.device).version
    return {
        **describe_environment(backend=place.backend, backend_version=version, device=place.device, threads=n_threads),
        **gpu,
        **{f"{name}_before": value for name, value in before.items() if name in _CHANGING},
    }


class _Steps:
    """Turns the progress of each step into that of the whole."""

    def __init__(self, n_steps: int, on_progress: Callable[[float], None]) -> None:
        self._n_steps, self._done, self._on_progress = n_steps, 0, on_progress

    def share(self, share_done: float) -> None:
        self._on_progress((self._done + share_done) / self._n_steps)

    def next(self) -> None:
        self._done += 1
        self.share(0)


def _instrumented(opened: Opened, workload: Workload, settings: Settings) -> dict[str, InstrumentedPass]:
    options = {name: one.options for name, one in opened.paths.items()}
    return {
        name: run_instrumented(
            name,
            runtime,
            workload,
            batch=settings.batch,
            duration_s=settings.duration_s,
            paths=options.get(name),
        )
        for name, runtime in opened.of_bundle.items()
    }


def _sweep(
    runtimes: dict[str, Orchestrator], workload: Workload, settings: Settings, batches: Sequence[int], steps: _Steps
) -> dict[int, dict[str, Samples]]:
    """Measure each batch size in alternating rounds of its own, sharing the duration between them."""
    found = {}
    for batch in batches:
        short = replace(settings, batch=batch, duration_s=settings.duration_s / len(batches))
        found[batch] = measure(runtimes, workload, short, on_round=steps.share)
        steps.next()
    return found


def _recommended(result: Profile, bundle: Bundle, directory: Path) -> Profile:
    """Return the profile with a recommendation, recorded in the engines' directory unless a warning says why not."""
    recommendation = recommend(
        result.samples,
        batch=result.settings.batch,
        policy=result.policy,
        input_source=result.input_source,
        environment=result.environment,
    )
    is_recorded, warnings = record(recommendation, directory, bundle=bundle.path, is_stable=not result.unstable)
    return replace(
        result, recommendation=recommendation, is_recorded=is_recorded, warnings=[*result.warnings, *warnings]
    )


def _policy_network(has_policy: bool, is_learned: bool) -> str:
    if not has_policy:
        return "none in this bundle"
    return "decides" if is_learned else "runs on every image, its bits are replaced by the POLICY"


def _input_warnings(data: ImageSource, is_learned: bool) -> list[str]:
    if data.is_real:
        return []
    learned = "; what a policy network keeps on them means nothing" if is_learned else ""
    return [f"the input is {data.description}{learned}. Give real ones with --data"]


def _baseline_warnings(graphs: dict[str, GraphChoice]) -> list[str]:
    return [
        f"{name} runs without a CUDA graph ({choice.reason}): a weaker baseline than a user would take"
        for name, choice in graphs.items()
        if is_static(name)
        and choice.mode == OFF
        and contender_of(name).cuda_graph is None  # else it was asked for by name
    ]


def _batches(batch: int, sweep: Sequence[int], opened: Opened) -> list[int]:
    """Return the batches of the sweep that run at once as they are; refuse a `batch` that would not."""
    least, most = opened.min_batch, opened.max_batch
    if batch > most:
        raise UsageError(
            f"--batch {batch}: the engines were built for at most {most} images, so that a request would run in "
            f"slices. Give --batch {most} or less, or build again with --max-batch {batch}"
        )
    if batch < least:
        raise UsageError(
            f"--batch {batch}: the engines were built for {least} images at least, so that a request would be filled "
            f"up. Give --batch {least}, or build again with --min-batch {batch}"
        )
    return [batch for batch in sweep if least <= batch <= most]


def _sweep_warnings(sweep: Sequence[int], opened: Opened) -> list[str]:
    above = [str(batch) for batch in sweep if batch > opened.max_batch]
    below = [str(batch) for batch in sweep if batch < opened.min_batch]
    reasons = (
        (above, f"bundle or engines were made with --max-batch {opened.max_batch}"),
        (below, f"engines were built with --min-batch {opened.min_batch}"),
    )
    return [f"batch {', '.join(out)} left out of the sweep: {reason}" for out, reason in reasons if out]

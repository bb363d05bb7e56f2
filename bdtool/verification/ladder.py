"""The parity ladder of a bundle: each rung compares one form of the network with the one before it.

    digests   every file is what the manifest says
    manifest  the network that the manifest describes is that of the MODEL in the bundle
    onnx      each ONNX part against its PyTorch module, on the activations of real paths
    engines   each engine against its ONNX part
    policy    keep bits of the policy engine against PyTorch's
    logits    the chain of engines, and on a few images the other strategies but `full`, against PyTorch's masked
              forward, on equal keep bits
    top1      the class of each image, chain against PyTorch

Where there is no PyTorch, or `bdtool pack` left out the weights, the bundle's exported ONNX parts take the place of
PyTorch, or else the parts that the engines are built from; what these cannot tell is not compared.

Policy flips and logits are separate rungs because one flipped bit makes any comparison of logits meaningless. For
another precision than the exported one the bounds are wider, and a rung `accuracy` on labelled images comes last. The
keep bits are those of the policy that `bdtool calibrate` made the parts for; those of the policy network (without one,
every block) for FP16 parts that a backend makes by itself, which are compared as they are built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bdtool.data.batches import ImageBatch, ImageSource, evenly_spread
from bdtool.errors import EngineError
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.runtime.place import Place
from bdtool.runtime.policies import parse_policy, parse_policy_for
from bdtool.runtime.preprocess import preprocess
from bdtool.runtime.result import RunResult
from bdtool.runtime.thresholds import threshold_of
from bdtool.verification.lower_precision import flips_bound, logits_error, lower_outputs, path_probes, terms_of
from bdtool.verification.onnx_classifier import OnnxClassifier
from bdtool.verification.oracle import is_own, model_in, oracle_for, why_no_pytorch
from bdtool.verification.part_comparison import compare_part
from bdtool.verification.strategy_check import LEARNED, answers_of, other_strategies, run_in_slices
from export.bundle import Bundle
from export.check import TOLERANCES, Comparison
from export.manifest import EXPORTED
from export.part_source import PartSource

if TYPE_CHECKING:
    from bdtool.models.model import BlockDropModel
    from bdtool.verification.oracle import Oracle

# Largest |difference| between the chain's logits and PyTorch's. Rounding grows with what is rounded: of logits above 10
# it is the share of the largest one that export allows of a part.
LOGITS_TOLERANCE = 1e-4
_N_PROBES = 4  # images at most, on which single parts and other strategies are compared
_N_NAMED = 5  # differences that a detail names
_UNITS = {
    "digests": "files",
    "manifest": "fields",
    "onnx": "of largest value",
    "engines": "of largest value",
    "policy": "of keep bits",
    "logits": "largest difference",
    "top1": "of predictions",
    "accuracy": "points",
}
_LOWER_UNITS = {**_UNITS, "logits": "rms, of logits"}


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One comparison: the worst figure found, the bound it must keep, and where it was found.

    `worst` and `bound` count `unit`s: damaged files, the share of flipped keep bits or of changed classes, percentage
    points, an error as a share of what it is compared with or as it is. `worst` is infinite where an engine gave no
    finite answer at all, and None where there is nothing to compare (a bundle without policy network, or without
    weights).
    """

    name: str
    worst: float | None
    bound: float
    unit: str
    detail: str

    @property
    def ok(self) -> bool:
        return self.worst is None or self.worst <= self.bound


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The whole ladder."""

    rungs: tuple[Rung, ...]
    n_images: int
    input_source: str
    oracle: str  # "PyTorch", or "ONNX": the bundle's parts

    @property
    def ok(self) -> bool:
        return all(rung.ok for rung in self.rungs)

    def to_json(self) -> dict[str, Any]:
        rungs = {
            r.name: {"ok": r.ok, "worst": _json_number(r.worst), "bound": r.bound, "unit": r.unit, "detail": r.detail}
            for r in self.rungs
        }
        return {
            "ok": self.ok,
            "oracle": self.oracle,
            "n_images": self.n_images,
            "input_source": self.input_source,
            "rungs": rungs,
        }


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What the upper rungs compare: a bundle's parts and engines at one place, and the oracle."""

    bundle: Bundle
    place: Place
    oracle: Oracle
    source: PartSource  # of the ONNX parts that the engines are built from
    chain: Orchestrator
    full: Orchestrator | None  # None: `bdtool pack` left it out

    @property
    def n_probes(self) -> int:
        """On how many images single engines are compared, each run by itself: no more than all take at once."""
        return min(_N_PROBES, *(runtime.max_batch for runtime in (self.chain, self.full) if runtime))


def verify(
    bundle: Bundle,
    data: ImageSource,
    place: Place,
    *,
    limit: int = 256,
    on_rung: Callable[[Rung], None] = lambda rung: None,
) -> Verification:
    """Climb the ladder with a bundle, which may be opened without a look at its digests.

    It ends where digests differ, or the manifest from the MODEL: whatever else is compared would be of another network.

    Args:
        data: images for the upper rungs; `limit` of them are drawn.

    Raises:
        BundleError: it has no parts of the precision, and the backend makes none; or it has nothing to compare with.
        CheckpointError: the bundle's weights cannot be loaded.
        BackendError: the engines cannot be built or run.
    """
    source = place.store(bundle).source
    rungs: list[Rung] = []

    def add(rung: Rung) -> bool:
        rungs.append(rung)
        on_rung(rung)
        return rung.ok

    def ladder(n_images: int) -> Verification:
        name = "PyTorch" if why_no_pytorch(bundle) is None else OnnxClassifier.name
        return Verification(rungs=tuple(rungs), n_images=n_images, input_source=data.description, oracle=name)

    if not add(_digests(bundle)):
        return ladder(0)
    model = model_in(bundle)
    if not add(_manifest(bundle, model)):
        return ladder(0)
    if source.precision != EXPORTED:  # ranges hold for the paths at the threshold that they were calibrated for
        bundle = bundle.with_threshold(threshold_of(terms_of(bundle, source).policy))
    data = data.drawn(limit)
    batch = data.take(limit)
    with ExitStack() as stack:
        strategies = ("chain", "full") if source.holds(bundle.network.require("full")) else ("chain",)
        chain, *full = [stack.enter_context(place.open(bundle, strategy)) for strategy in strategies]
        subject = _Subject(
            bundle=bundle,
            place=place,
            oracle=oracle_for(bundle, source, model),
            source=source,
            chain=chain,
            full=full[0] if full else None,
        )
        climb = _climb_exported if source.precision == EXPORTED else _climb_lower
        for rung in climb(subject, batch):
            add(rung)
    return ladder(len(batch.images))


def _json_number(worst: float | None) -> float | None:
    """JSON has no infinity: `worst` is null and `ok` false."""
    return worst if worst is not None and math.isfinite(worst) else None


def _digests(bundle: Bundle) -> Rung:
    n_files, differing = bundle.compare_digests()
    detail = "; ".join(differing) or f"{n_files} files as in the manifest"
    return _rung("digests", len(differing), 0, detail)


def _manifest(bundle: Bundle, model: BlockDropModel | None) -> Rung:
    if model is None:
        return _not_compared("manifest", bundle)
    from bdtool.verification.manifest_check import compare_with_model

    n_fields, differing = compare_with_model(bundle, model)
    if not differing:
        return _rung("manifest", 0, 0, f"{n_fields} fields as in the MODEL")
    more = f"; and {len(differing) - _N_NAMED} more" if len(differing) > _N_NAMED else ""
    detail = f"{'; '.join(differing[:_N_NAMED])}{more}: the manifest was changed. Export the model again"
    return _rung("manifest", len(differing), 0, detail)


def _rung(name: str, worst: float | None, bound: float, detail: str) -> Rung:
    return Rung(name=name, worst=worst, bound=bound, unit=_UNITS[name], detail=detail)


def _not_compared(name: str, bundle: Bundle) -> Rung:
    return _rung(name, None, 0.0, f"not compared: {why_no_pytorch(bundle)}")


def _climb_exported(subject: _Subject, batch: ImageBatch) -> Iterator[Rung]:
    """Compare the parts that `bdtool export` wrote."""
    images, network, oracle = batch.images, subject.bundle.network, subject.oracle
    few = images[evenly_spread(subject.n_probes, len(images))]
    every = np.ones((len(few), network.n_blocks), dtype=bool)
    yield from _part_rungs(subject, few, every)
    yield from _unless_it_fails(("policy",), lambda: _policy_rungs(subject.chain, oracle, images))
    yield from _unless_it_fails(("logits", "top1"), lambda: _output_rungs(subject, oracle, images))


def _unless_it_fails(names: tuple[str, ...], compare: Callable[[], list[Rung]]) -> list[Rung]:
    """Return the rungs of a comparison; where an engine or the oracle gives no answer they failed; others follow."""
    try:
        return compare()
    except EngineError as exc:
        return [_rung(name, math.inf, 0.0, str(exc)) for name in names]


def _climb_lower(subject: _Subject, batch: ImageBatch) -> Iterator[Rung]:
    """Compare parts of another precision, whose errors are of another size, and whose last word is the accuracy."""
    chain, network = subject.chain, subject.bundle.network
    terms = terms_of(subject.bundle, subject.source)
    request = parse_policy_for(network, terms.policy)
    oracle = subject.oracle
    try:
        keep = oracle.decide(batch.images) if request.is_learned else request.matrix_at(batch.rows)
    except EngineError as exc:  # without bits there are no paths to compare
        yield from (_rung(name, math.inf, 0.0, str(exc)) for name in ("policy", "logits", "top1"))
        return
    few = evenly_spread(subject.n_probes, len(keep))
    yield from _part_rungs(subject, batch.images[few], keep[few])
    flips = terms.policy_flips
    yield from _unless_it_fails(("policy",), lambda: _policy_rungs(chain, oracle, batch.images, measured=flips))
    try:
        expected = oracle.run(batch.images, keep)
        actual = run_in_slices(chain, batch.images, keep, size=network.bulk_batch)
        few = evenly_spread(_N_PROBES, len(keep))
        others = _lower_errors(subject, batch.images[few], keep[few], expected.logits[few])
    except EngineError as exc:
        yield from (_rung(name, math.inf, 0.0, str(exc)) for name in ("logits", "top1"))
        return
    rows = lower_outputs(
        expected.logits,
        actual.logits,
        batch.labels,
        precision=subject.source.precision,
        max_accuracy_drop=terms.max_accuracy_drop,
        oracle=oracle.name,
    )
    for name, worst, allowed, detail in rows:
        detail = f"policy {request.name}; {detail}"
        if name == "logits" and worst is not None:
            worst = max([worst, *others.values()])
            detail += f"; {_strategies(others)}"
        yield Rung(name=name, worst=worst, bound=allowed, unit=_LOWER_UNITS[name], detail=detail)


def _part_rungs(subject: _Subject, images: np.ndarray, keep: np.ndarray) -> list[Rung]:
    """Return the rungs onnx and engines: each part alone, on images uint8 [n, height, width, 3] and their paths."""
    network, oracle = subject.bundle.network, subject.oracle
    rows = []
    for probe in path_probes(oracle.run_part, network, preprocess(images, network.preprocessing), keep):
        runtime = subject.full if probe.part.kind == "full" else subject.chain
        if runtime is not None:
            rows.append((probe.part.name, *compare_part(subject.source, probe, images, runtime)))
    onnx = _worst("onnx", [(onnx, name) for name, onnx, _ in rows])
    return [
        _not_compared("onnx", subject.bundle) if is_own(oracle, subject.source) else onnx,
        _worst("engines", [(engine, name) for name, _, engine in rows]),
    ]


def _worst(name: str, comparisons: list[tuple[Comparison, str]]) -> Rung:
    worst, where = max(comparisons, key=lambda row: row[0].share_of_bound)
    return _rung(name, worst.error, worst.tolerance, f"{len(comparisons)} parts, worst {where}")


def _policy_rungs(
    chain: Orchestrator, oracle: Oracle, images: np.ndarray, *, measured: float | None = None
) -> list[Rung]:
    """Compare keep bits; the policy engine runs alone, so that a damaged block cannot hide its answer.

    `measured` is the share that flips by rounding, as calibration saw it; None allows no flip.
    """
    if not chain.network.has_policy:
        return [_rung("policy", None, 0.0, "the bundle has no policy network")]
    theirs = oracle.keep_probability(images)
    differ = chain.decide(images) != (theirs >= oracle.network.threshold)
    detail = f"{differ.sum()} of {differ.size} keep bits differ"
    if differ.any():  # a probability at the threshold tips over with the last digit; one far from it does not
        distance = np.abs(theirs - oracle.network.threshold)[differ].max()
        detail += f", {oracle.name}'s probability up to {distance:.1g} from the threshold"
    bound = 0.0 if measured is None else flips_bound(measured, differ.size)
    return [_rung("policy", float(differ.mean()), bound, detail)]


def _output_rungs(subject: _Subject, oracle: Oracle, images: np.ndarray) -> list[Rung]:
    """Compare logits and classes on equal keep bits: every block, half of them, and what the network does by itself."""
    chain, place = subject.chain, subject.place
    n_blocks = chain.network.n_blocks
    policies = {"all": np.ones((len(images), n_blocks), dtype=bool)}
    half = parse_policy(f"random:{n_blocks // 2}", n_blocks=n_blocks, has_policy_network=False)
    policies[half.name] = half.matrix(len(images))
    if chain.network.has_policy:
        policies[LEARNED] = oracle.decide(images)
    elif (mask := chain.network.mask) is not None:
        policies[mask] = parse_policy_for(chain.network, mask).matrix(len(images))
    answers = []
    for name, keep in policies.items():
        result = run_in_slices(chain, images, keep, size=chain.network.bulk_batch)
        answers.append(_Answer("chain", name, images, keep, result))
    rows = evenly_spread(_N_PROBES, len(images))
    few, given = images[rows], {name: keep[rows] for name, keep in policies.items()}
    # what the policy engine says; where it is not what the oracle says, the rung before this one has failed
    if LEARNED in given:
        given[LEARNED] = chain.decide(few)
    for strategy in other_strategies(place, chain):
        found = answers_of(subject.bundle, strategy, place, few, given)
        answers += [_Answer(strategy, name, few, given[name], result) for name, result in found.items()]
    return _compare_answers(answers, oracle)


@dataclass(frozen=True)
class _Answer:
    """What a strategy answered on images uint8 [n, H, W, 3] to a policy, which should have kept `keep`, bool [n, K]."""

    strategy: str
    policy: str
    images: np.ndarray
    keep: np.ndarray
    result: RunResult


def _compare_answers(answers: list[_Answer], oracle: Oracle) -> list[Rung]:
    """Return the rungs logits and top1."""
    errors, bounds, changed = {}, {}, 0
    for answer in answers:
        result, expected = answer.result, oracle.run(answer.images, answer.keep)
        error = float(np.abs(result.logits - expected.logits).max())
        if not np.array_equal(result.policy, answer.keep):  # it decided by itself, and otherwise
            error = math.inf
        name = f"{answer.policy} by {answer.strategy}"
        errors[name], bounds[name] = error, _logits_bound(expected.logits)
        changed += int((result.classes != expected.classes).sum())
    where = max(errors, key=lambda name: errors[name] / bounds[name])
    n_answers = sum(len(answer.keep) for answer in answers)
    policies = dict.fromkeys(answer.policy for answer in answers)
    others = dict.fromkeys(answer.strategy for answer in answers if answer.strategy != "chain")
    logits = f"policies {', '.join(policies)}; {_strategies(others)}; worst {where}"
    return [
        _rung("logits", errors[where], bounds[where], logits),
        _rung("top1", changed / n_answers, 0.0, f"{changed} of {n_answers} predictions differ"),
    ]


def _logits_bound(expected: np.ndarray) -> float:
    return max(LOGITS_TOLERANCE, TOLERANCES[EXPORTED] * float(np.abs(expected).max()))


def _lower_errors(subject: _Subject, images: np.ndarray, keep: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Return the error of the logits that each strategy but `chain` and `full` gives, as a share of them."""
    bundle, place = subject.bundle, subject.place
    names = other_strategies(place, subject.chain)
    answers = {name: answers_of(bundle, name, place, images, {"given": keep}) for name in names}
    return {name: logits_error(expected, answer["given"].logits) for name, answer in answers.items()}


def _strategies(others: Iterable[str]) -> str:
    return f"strategies {', '.join(['chain', *others])}"

"""`bdtool train`: a stage from MODEL files and data to a MODEL file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bdtool.errors import EngineError, PolicyError, UsageError
from bdtool.evaluation import evaluate
from bdtool.models.model import BlockDropModel, build_model
from bdtool.models.model_spec import ModelSpec
from bdtool.models.state import non_finite_names
from bdtool.models.store import save_model
from bdtool.runtime.policies import PolicyRequest, bits_of, parse_policy
from bdtool.runtime.thresholds import threshold_of
from bdtool.torch_classifier import TorchClassifier
from bdtool.training.budget import shift_policy
from bdtool.training.distributed import synchronize_batch_norms
from bdtool.training.images import training_images
from bdtool.training.imitation import Imitation
from bdtool.training.options import (
    Amp,
    CurriculumOptions,
    FinetuneOptions,
    ImitateOptions,
    PretrainOptions,
    StageOptions,
    TrainOptions,
)
from bdtool.training.paths import deployed_paths, heuristic_paths
from bdtool.training.pieces import run_pieces
from bdtool.training.place import TrainingPlace
from bdtool.training.policy_network import with_policy, without_policy
from bdtool.training.progress_file import diverged
from bdtool.training.provenance import finished_model, origin_of, run_request
from bdtool.training.tasks import CurriculumTask, FinetuneTask, Paths, PretrainTask, Task
from bdtool.training.teacher import Teacher
from bdtool.training.trainer import Epoch, Trainer
from bdtool.training.trunk import command_for_trunk
from bdtool.words import counted, listing

logger = logging.getLogger(__name__)
_FEW_STEPS = 100  # of imitate: after 50 at its default rate a new policy network still keeps most blocks of all images


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run: its MODEL, what `val` gave, and its epochs."""

    model: BlockDropModel
    figures: Mapping[str, float]
    epochs: list[Epoch]


def pretrain(spec: ModelSpec, options: PretrainOptions, place: TrainingPlace) -> Trained:
    """Train a base network from random weights; `spec` says which, without a policy network."""
    place = place.with_sample(options.limit)
    with place.reserved():
        model = build_model(dataclasses.replace(spec, has_policy=False), seed=options.seed)
        return _train(model, "pretrain", options, place, lambda m, amp: PretrainTask(m, options, amp=amp))


def curriculum(
    start: BlockDropModel, options: CurriculumOptions, place: TrainingPlace, *, trunk: BlockDropModel | None = None
) -> Trained:
    """Train a policy network for the base of `start`, from random weights or from the one that `start` has.

    Args:
        trunk: a trained classifier of a policy network's architecture, for a new policy network to start from: what
            tells the classes apart also tells easy images from hard ones, and a policy gradient alone takes long to
            find it. The new one scales images down by as much as `trunk` does, and has a hidden layer as wide as the
            one of `start`, where there is one.

    Raises:
        UsageError: `trunk` has another architecture, shortcut or input than the policy network; or the run would end
            before all blocks are learned.
    """
    place = place.with_sample(options.limit)
    if options.batch <= place.train.n_images:  # else the trainer refuses the batch
        steps_per_epoch = place.train.n_images // options.batch
        options.check_all_learned(steps_per_epoch=steps_per_epoch, n_blocks=start.n_blocks)
    with place.reserved():
        model = with_policy(start, seed=options.seed, n_hidden=start.spec.policy_hidden, trunk=trunk)
        return _train(
            model,
            "curriculum",
            options,
            place,
            lambda m, amp: CurriculumTask(m, options, amp=amp),
            origins=origin_of("policy_trunk", trunk),
        )


def imitate(
    start: BlockDropModel, options: ImitateOptions, place: TrainingPlace, *, trunk: BlockDropModel | None = None
) -> Trained:
    """Train a policy network for the base of `start` to give harder images more blocks: `bdtool.training.imitation`.

    Args:
        trunk: as for `curriculum`.

    Raises:
        UsageError: `trunk` does not fit, the model has not so many blocks, or several processes were started.
        DataError: images cannot be read; if those are of `place.val`, what was learned is in the checkpoint.
    """
    if place.group.size > 1:
        raise UsageError(f"imitate: got {place.group.size} processes, expected one; start it without torchrun")
    with place.reserved():
        return _imitate(start, options, place.with_sample(options.limit), trunk)


def _imitate(
    start: BlockDropModel, options: ImitateOptions, place: TrainingPlace, trunk: BlockDropModel | None
) -> Trained:
    place.check_resume()
    _warn_of_few_steps(options, place.train.n_images)
    if start.policy is None and trunk is None:
        logger.warning(
            "imitate: got no --trunk; the new policy network looks at images through random weights, which stay as "
            "they are, and tells easy ones from hard ones less well. %s makes a trunk",
            command_for_trunk(start.spec),
        )
    model = with_policy(start, seed=options.seed, n_hidden=options.hidden, trunk=trunk)
    model.to(device=place.group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = training_images(place.train, model.spec.preprocessing, device=torch.device("cpu")).facts
    imitation = Imitation(model, place.train, options, goes_on=model is start)
    figures = run_pieces(
        imitation,
        place,
        request=run_request(model.spec, "imitate", options, place, data, amp=False),
        measure=lambda: _measure(model, options, place),
    )
    masks = {str(int(mask.sum())): bits_of(mask.numpy()) for mask in imitation.masks}
    origins = {"masks": masks, **origin_of("policy_trunk", trunk)}
    finished = finished_model(model, "imitate", options, data, place.val, figures, origins)
    if bad := non_finite_names(finished.state_dict()):
        raise diverged(f"NaN or infinite weights in {listing(bad)}", place.checkpoint)
    save_model(finished, place.output)
    place.checkpoint.unlink(missing_ok=True)
    return Trained(model=finished, figures=figures, epochs=[])


def _warn_of_few_steps(options: ImitateOptions, n_images: int) -> None:
    n_steps = options.n_fit_steps(n_images)
    if n_steps < _FEW_STEPS:
        logger.warning(
            "imitate: epochs %g of %d images in batches of %d are %s, in which the policy network hardly learns: a new "
            "one will keep nearly all blocks. Give a smaller --batch or more --epochs, for %d steps or more",
            options.epochs,
            n_images,
            options.batch,
            counted(n_steps, "step"),
            2 * _FEW_STEPS,
        )


def finetune(
    start: BlockDropModel, options: FinetuneOptions, place: TrainingPlace, *, teacher: BlockDropModel | None = None
) -> Trained:
    """Train base and policy network of `start` together, or its base alone under the heuristic `options.policy`.

    Args:
        teacher: a base whose answers the base of `start` learns besides the labels: `bdtool.training.teacher`.

    Raises:
        PolicyError: the policy does not fit the model or the data, or is learned and `start` has no policy network; or
            it gives each training image its own bits, which `place.val` cannot be measured with.
        UsageError: `freeze_policy` beside a heuristic; or `teacher` has a policy network, other classes, or takes
            pictures of another size.
    """
    if options.thresholds is None and threshold_of(options.policy) is not None:
        raise UsageError(
            f"policy {options.policy}: one threshold is for deployment. Train with learned, and --blocks for the "
            "number of blocks that the policy network shall keep, or with learned:LOW-HIGH"
        )
    if options.thresholds is not None and not options.freeze_policy:
        raise UsageError(f"policy {options.policy}: the policy network does not learn; add --freeze-policy")
    place = place.with_sample(options.limit)
    request = parse_policy(options.single_policy, n_blocks=start.n_blocks, has_policy_network=start.policy is not None)
    if options.freeze_policy and not request.is_learned:
        raise UsageError(f"policy {request.name}: has no policy network to freeze; use freeze_policy with learned")
    if request.n_rows is not None and place.val is not None:
        raise PolicyError(
            f"policy {request.name}: has a row for each training image, which says nothing of the images of --val "
            f"({place.val.description}). Leave --val out, and measure by `bdtool evaluate` with rows for those images, "
            f"or give one row [{start.n_blocks}] for all"
        )
    taught_by = None if teacher is None else Teacher(teacher, start.spec, device=place.group.device)
    with place.reserved():
        model = start if request.is_learned else without_policy(start, mask=_mask_of(request))
        if options.blocks:
            shift_policy(model, place.train, options.blocks)
        paths = _fixed_paths(model, request, options, place)
        return _train(
            model,
            "finetune",
            options,
            place,
            lambda m, amp: FinetuneTask(m, options, paths, teacher=taught_by, amp=amp),
            origins=origin_of("teacher", teacher),
        )


def _mask_of(request: PolicyRequest) -> str | None:
    """Return the keep bits that a base is trained for, where they are the same for all images and drop a block."""
    mask = request.mask
    return None if mask is None or mask.all() else bits_of(mask)


def _fixed_paths(
    model: BlockDropModel,
    request: PolicyRequest,
    options: FinetuneOptions,
    place: TrainingPlace,
) -> Paths | None:
    """Return the paths that the base alone learns along, or None where the policy network learns, too."""
    if not request.is_learned:
        return heuristic_paths(request, place.train)
    if not options.freeze_policy:
        return None
    model.to(device=place.group.device)
    return deployed_paths(model, place.train, group=place.group, thresholds=options.thresholds, seed=options.seed)


def computes_in_bfloat16(amp: Amp, device: torch.device) -> bool:
    """Say whether to autocast: `auto` does where it is faster, which takes units for matrices of bfloat16.

    On CPUs that is AMX. AVX-512 BF16 without it is slower than float32: see benchmarks/README.md.
    """
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_amx_tile_supported()


def _train(
    model: BlockDropModel,
    stage: str,
    options: TrainOptions,
    place: TrainingPlace,
    make_task: Callable[[BlockDropModel, bool], Task],
    *,
    origins: Mapping[str, Any] | None = None,
) -> Trained:
    """Train, and write the MODEL; `origins` are the provenances of other MODELs that it learned from."""
    group = place.group
    place.check_resume()
    model.to(device=group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if group.size > 1 and model.policy is not None:
        synchronize_batch_norms(model.policy)
    amp = computes_in_bfloat16(options.amp, group.device)
    images = training_images(place.train, model.spec.preprocessing, device=group.device, augment=options.augment)
    trainer = Trainer(
        model,
        make_task(model, amp),
        images,
        options,
        group=group,
        request=run_request(model.spec, stage, options, place, images.facts, amp=amp),
        checkpoint=place.checkpoint,
        save_every_s=place.save_every_s,
        on_step=place.on_step,
        on_epoch=place.on_epoch,
        validate=lambda: _measure(model, options, place),
    )
    if trainer.step and group.is_first:
        place.on_resume(trainer.where)
    epochs = trainer.run()
    figures = epochs[-1].validation  # of the model as it is: a run ends with an epoch
    finished = finished_model(model, stage, options, images.facts, place.val, figures, origins or {})
    if group.is_first:
        save_model(finished, place.output)
        place.checkpoint.unlink(missing_ok=True)
    return Trained(model=finished, figures=figures, epochs=epochs)


def _measure(model: BlockDropModel, options: StageOptions, place: TrainingPlace) -> dict[str, float]:
    """Return accuracy and blocks on `val` in float32: of the greedy policy, or of the heuristic that is trained.

    Raises:
        TrainingError: the model gives NaN or infinity.
    """
    if place.val is None:
        return {}
    policy = options.single_policy if isinstance(options, FinetuneOptions) else None
    try:
        result = evaluate(TorchClassifier(model), place.val, policy=policy, batch_size=500)
    except EngineError as exc:
        raise diverged(f"--val cannot be measured: {exc}", place.checkpoint) from exc
    return {
        "accuracy": result.accuracy,
        "blocks_mean": result.blocks_mean,
        "blocks_std": result.blocks_std,
        "flops_mean": result.flops_mean,
        "unique_policies": result.unique_policies,
        "n_images": result.n_images,
    }

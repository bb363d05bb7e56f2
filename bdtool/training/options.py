"""What a training run is asked to do, as plain data. Loads no torch.

Where a default is not the paper's (Wu et al., CVPR 2018) or the authors' code's, the field says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bdtool.errors import UsageError
from bdtool.runtime.thresholds import threshold_range_of

Schedule = Literal["constant", "one-cycle", "cosine", "step"]
Amp = Literal["auto", "bf16", "off"]
Augment = Literal["crop", "flip"]


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What all stages share.

    Attributes:
        epochs: passes over the data set; an image more or less than a whole number of batches is left out each epoch.
        batch: images of a step, over all processes.
        lr: the highest learning rate.
        schedule: one-cycle warms up and falls to almost 0; cosine falls to 0; step divides by 10 at half and at three
            quarters of the run.
        seed: of every draw: shuffling, augmentation and keep bits.
        limit: draw so many images from the data set, for everything that is learned or counted; None reads all.
    """

    epochs: float
    batch: int = 256
    lr: float
    schedule: Schedule = "constant"
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.epochs < math.inf or self.batch < 2 or not 0 < self.lr < math.inf:
            raise UsageError(
                f"epochs {self.epochs}, batch {self.batch}, lr {self.lr}: expected a finite number of epochs above 0, "
                "a batch of at least 2 and a finite lr above 0"
            )

    def n_steps(self, steps_per_epoch: int) -> int:
        return max(1, round(self.epochs * steps_per_epoch))


@dataclass(frozen=True, kw_only=True)
class TrainOptions(StageOptions):
    """What the stages share that learn from augmented images, step by step.

    Attributes:
        amp: bfloat16 autocast; auto takes it where that is faster (CUDA, and CPUs with AMX).
        augment: crop shifts small images, black moving in, or takes a part of large ones, and flips half of them (He et
            al., CVPR 2016, section 4.2); flip only flips, and otherwise trains on the images as they will be deployed.
    """

    amp: Amp = "auto"
    augment: Augment = "crop"


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainOptions):
    """A base network alone: SGD with Nesterov momentum (He et al., CVPR 2016, section 4.2: 0.1, 0.9, 1e-4)."""

    epochs: float = 30
    batch: int = 128
    lr: float = 0.1
    schedule: Schedule = "one-cycle"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class CurriculumOptions(TrainOptions):
    """The policy network alone: section 3.3, Adam.

    Attributes:
        batch: the paper trains with 2048, the authors' code defaults to 256.
        gamma: penalty of a wrong prediction; the paper chooses it for the wanted accuracy, the authors' default is 1.
        alpha: bounds the sampling probability; the paper's 0.8.
        entropy: weight of the entropy bonus; the authors' 0.1.
        stage_epochs: epochs after which `stage_blocks` more blocks are learned, from the last to the first; the paper
            learns one more each epoch. None is automatic: stages of one length, by which all blocks are learned from
            half of the run on, so that the other half is for all of them together.
    """

    epochs: float = 20
    lr: float = 1e-3
    gamma: float = 5.0
    alpha: float = 0.8
    entropy: float = 0.1
    stage_epochs: float | None = None
    stage_blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_policy_options(self.gamma, self.alpha)
        if not (self.stage_epochs is None or 0 < self.stage_epochs < math.inf) or self.stage_blocks < 1:
            raise UsageError(
                f"stage_epochs {self.stage_epochs}, stage_blocks {self.stage_blocks}: expected a finite number of "
                "epochs above 0, and at least 1 block"
            )

    def n_learned(self, step: int, *, steps_per_epoch: int, n_blocks: int) -> int:
        """Return how many of a model's `n_blocks` blocks, counted from the last, step `step` learns; the first is 0."""
        if self.stage_epochs is None:
            done = (step + 1) / self.n_steps(steps_per_epoch)  # with this step, so that a single one learns all
            stages = math.ceil(2 * done * self._n_stages(n_blocks))
        else:
            stages = 1 + int(step / (self.stage_epochs * steps_per_epoch))
        return min(n_blocks, stages * self.stage_blocks)

    def check_all_learned(self, *, steps_per_epoch: int, n_blocks: int) -> None:
        """Refuse stages of which the run ends before the last.

        Raises:
            UsageError: blocks would be left that were never learned, but that the policy network decides on.
        """
        last = self.n_steps(steps_per_epoch) - 1
        n_learned = self.n_learned(last, steps_per_epoch=steps_per_epoch, n_blocks=n_blocks)
        if n_learned == n_blocks:
            return
        assert self.stage_epochs is not None
        n_needed = (self._n_stages(n_blocks) - 1) * self.stage_epochs + 1 / steps_per_epoch
        raise UsageError(
            f"stage_epochs {self.stage_epochs:g}, stage_blocks {self.stage_blocks}: got {self.epochs:g} epochs, which "
            f"learn the last {n_learned} of {n_blocks} blocks; the others would be decided on unlearned. Leave "
            f"--stage-epochs out, which learns all by half of the run, or give --epochs {math.ceil(n_needed)}"
        )

    def _n_stages(self, n_blocks: int) -> int:
        return math.ceil(n_blocks / self.stage_blocks)


@dataclass(frozen=True, kw_only=True)
class ImitateOptions(StageOptions):
    """The policy network alone, by what the base's own losses show: more blocks for harder images. Not in the paper.

    Attributes:
        fewest, most: blocks of the easiest and of the hardest two fifths of the images; the others get the mean of
            both. 0 takes a third and 0.6 of the model's blocks.
        hidden: width of a hidden layer of a new policy network; 0, as in the paper, for none.
        judges: training images on which nested masks are compared, in K (K + 1) / 2 passes at most.
    """

    epochs: float = 16
    batch: int = 512
    lr: float = 3e-3
    schedule: Schedule = "cosine"
    fewest: int = 0
    most: int = 0
    hidden: int = 64
    judges: int = 1200

    def n_fit_steps(self, n_images: int) -> int:
        """Return in how many steps the policy network learns from that many images."""
        return max(1, round(self.epochs * n_images / self.batch))

    def blocks_of(self, n_blocks: int) -> tuple[int, int]:
        """Return `fewest` and `most` for a model of `n_blocks` blocks.

        Raises:
            UsageError: they do not fit it.
        """
        fewest, most = self.fewest or round(n_blocks / 3), self.most or round(0.6 * n_blocks)
        if not fewest <= most <= n_blocks:
            raise UsageError(
                f"fewest {fewest}, most {most}: expected no more at the first than at the second, and at most the "
                f"model's {n_blocks} blocks"
            )
        return fewest, most


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainOptions):
    """Base and policy network together: section 3.3, "joint finetuning".

    Attributes:
        lr: of the policy network, by Adam; the authors' 1e-4.
        policy: learned, or a heuristic whose base alone is trained, by cross-entropy; or "learned:0.1-0.95" beside
            `freeze_policy`: the base learns the paths at all thresholds between these.
        base_lr: of the base, by SGD with Nesterov momentum. The authors use Adam with `lr` for both, for 2,000 epochs.
        gamma, alpha, entropy: as in the curriculum; the authors' 5, 0.8 and 0.
        freeze_policy: the policy network stays as it is, and the base learns along the paths that it takes when
            deployed: of each image as it is, also where the base sees a crop of it. Not in the paper.
        blocks: first shift the policy network so that it keeps this many blocks on average; 0 leaves it.
    """

    epochs: float = 20
    lr: float = 1e-4
    schedule: Schedule = "one-cycle"
    policy: str = "learned"
    base_lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gamma: float = 5.0
    alpha: float = 0.8
    entropy: float = 0.0
    freeze_policy: bool = False
    blocks: float = 0.0

    @property
    def thresholds(self) -> tuple[float, float] | None:
        """The thresholds of a `policy` learned:LOW-HIGH."""
        return threshold_range_of(self.policy)

    @property
    def trains_policy(self) -> bool:
        """Whether the policy network learns, or the base alone."""
        return self.policy == "learned" and not self.freeze_policy

    @property
    def single_policy(self) -> str:
        """The POLICY that it is measured with: of all the thresholds the policy network's own."""
        return self.policy if self.thresholds is None else "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_policy_options(self.gamma, self.alpha)
        if not 0 < self.base_lr < math.inf:
            raise UsageError(f"base_lr {self.base_lr}: expected a finite number above 0")


def check_policy_options(gamma: float, alpha: float) -> None:
    if not 0 <= gamma < math.inf or not 0.5 < alpha < 1:
        raise UsageError(f"gamma {gamma}, alpha {alpha}: expected gamma of at least 0 and alpha between 0.5 and 1")

"""Where a training run reads, writes and computes, which it has to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bdtool.data.batches import ImageSource
from bdtool.errors import DataError, UsageError
from bdtool.training.distributed import Group
from bdtool.training.trainer import Epoch, Report
from export.files import exclusive_lock, remove_leftovers

_CHECKPOINT = ".checkpoint"


@dataclass(frozen=True, kw_only=True)
class TrainingPlace:
    """Where a run reads, writes and computes.

    Attributes:
        output: the MODEL file to write; the checkpoint of the unfinished run lies beside it, as OUTPUT.checkpoint.
            While a run is at work others into the same output are refused, by the lock file .OUTPUT.lock.
        val: labelled images to measure on after each epoch and at the end; None measures nothing.
        on_resume: told where an unfinished run is taken up: "step 5 of 12".
        start: digests of the MODELs that the run starts or learns from, a trunk or teacher, too; a checkpoint of a run
            from others is refused.
    """

    train: ImageSource
    val: ImageSource | None
    output: Path
    group: Group
    resume: bool = False
    start: str = ""
    save_every_s: float = 120
    on_resume: Callable[[str], None] = lambda where: None
    on_step: Callable[[Report], None] = lambda report: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_progress: Callable[[float, str], None] = lambda share, text: None

    def __post_init__(self) -> None:
        if self.output.name.lower().endswith(_CHECKPOINT):
            raise UsageError(
                f"output {self.output}: files that end in {_CHECKPOINT} hold unfinished runs; give the MODEL another "
                f"name, for instance {Path(self.output.stem).with_suffix('.safetensors')}"
            )
        if self.val is not None and not self.val.has_labels:  # class numbers are checked where it is opened
            raise DataError(
                f"no labels in {self.val.description}, by which to measure; give --val an .npz with y, or one folder "
                "a class, or leave it out"
            )

    @property
    def checkpoint(self) -> Path:
        return self.output.with_name(self.output.name + _CHECKPOINT)  # whole: net.v1 and net.v2 are two runs

    def check_resume(self) -> None:
        """Refuse to start over an unfinished run, and to go on where there is none but a finished one.

        Raises:
            UsageError: `resume` says otherwise than the files.
        """
        if self.checkpoint.exists() and not self.resume:
            raise UsageError(
                f"{self.checkpoint} holds an unfinished run: add --resume to go on with it, or remove it to start anew"
            )
        if self.resume and self.output.exists() and not self.checkpoint.exists():
            raise UsageError(
                f"nothing to go on with: {self.output} is there, and no unfinished run beside it. Leave --resume out "
                "to train it anew"
            )

    def with_sample(self, n_images: int | None) -> TrainingPlace:
        """Return the same place with that many images drawn from `train`; None leaves all."""
        return replace(self, train=self.train.drawn(n_images))

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep other runs from the same output, as each would overwrite the other's MODEL and checkpoint.

        The first process of a group holds the lock for all.

        Raises:
            BundleError: another run is at work.
        """
        with ExitStack() as held:
            if self.group.is_first:
                lock = self.output.with_name(f".{self.output.name}.lock")
                held.enter_context(exclusive_lock(lock, purpose=f"training into {self.output}"))
                remove_leftovers(self.output.parent, [self.output.name, self.checkpoint.name])
            yield

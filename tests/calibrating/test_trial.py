"""What a candidate is judged on, and how far its measuring is."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from bdtool import Orchestrator
from bdtool.calibrating.trial import Trial
from bdtool.data.batches import ImageSource
from bdtool.data.synthetic import synthetic_images
from bdtool.runtime.policies import parse_policy_for
from export.bundle import Bundle
from tests.conftest import Exported


def _images(n_images: int = 100, *, shift: int = 0, labels: bool = True) -> ImageSource:
    """Return pictures in two batches; `shift` changes the last one's colours and nothing else."""
    pictures = synthetic_images(n_images, height=32, width=32).copy()
    pictures[-1] ^= np.uint8(shift)
    return ImageSource(
        description="pictures",
        is_real=True,
        names=[str(i) for i in range(n_images)],
        labels=np.arange(n_images) % 3 if labels else None,
        image_at=lambda index: pictures[index],
    )


def _trial(bundle: Path, tmp_path: Path, images: ImageSource, policy: str = "all") -> Trial:
    with Orchestrator.open(bundle) as runtime:
        request = parse_policy_for(runtime.network, policy)
    return Trial(
        evaluation=images, policy=request, max_accuracy_drop=1, threads=None, engines=tmp_path, on_share=lambda _: None
    )


def test_digest_is_of_images_labels_and_policy(tiny: Exported, tmp_path: Path) -> None:
    """Errors measured before an interruption are taken up where all three are the same."""
    images = _images()
    first = _trial(tiny.bundle, tmp_path, images).digest()
    assert _trial(tiny.bundle, tmp_path, _images()).digest() == first
    labelled_otherwise = replace(images, labels=np.arange(images.n_images) % 2)
    others = [
        _trial(tiny.bundle, tmp_path, _images(shift=1)).digest(),
        _trial(tiny.bundle, tmp_path, _images(labels=False)).digest(),
        _trial(tiny.bundle, tmp_path, labelled_otherwise).digest(),
        _trial(tiny.bundle, tmp_path, images, "random:1").digest(),
    ]
    assert len({first, *others}) == 5


def test_measuring_says_how_far_it_is(tiny: Exported, tmp_path: Path) -> None:
    shares: list[float] = []
    trial = replace(_trial(tiny.bundle, tmp_path, _images()), on_share=shares.append)
    with trial.open(Bundle.open(tiny.bundle), "fp32") as fp32:
        trial.measure(trial.reference(fp32), fp32)
    assert len(shares) > 1
    assert shares == sorted(set(shares))
    assert shares[-1] == 1

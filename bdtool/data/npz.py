"""`FILE.npz`: images in array `x`, labels in array `y`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from bdtool.data.batches import ImageSource
from bdtool.data.images import fit_image
from bdtool.errors import DataError
from bdtool.specs import NetworkSpec, Preprocessing

_EXPECTED = "expected x uint8 [N, H, W, 3] and optionally y, whole numbers [N]"


def npz_source(path: Path, *, network: NetworkSpec, resize: bool) -> ImageSource:
    """Open an .npz file; nothing in it is ever unpickled.

    Raises:
        DataError: the file is damaged, or an array has another dtype, shape, length or label range.
    """
    arrays = _read_arrays(path)
    if "x" not in arrays:
        raise DataError(f"{path}: no array 'x' in it; {_EXPECTED}. Save it with np.savez(FILE, x=images, y=labels)")
    images = _checked_images(arrays["x"], path=path)
    labels = None
    if "y" in arrays:
        labels = checked_labels(arrays["y"], n_images=len(images), n_classes=network.n_classes, source=str(path))
    return array_source(
        images, labels, description=str(path), preprocessing=network.preprocessing, resize=resize, name=path.name
    )


def array_source(
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    description: str,
    preprocessing: Preprocessing,
    resize: bool,
    name: str,
) -> ImageSource:
    """Return a source over images uint8 [N, H, W, 3] in memory, called name[0], name[1] and so on."""
    names = tuple(f"{name}[{index}]" for index in range(len(images)))

    def image_at(index: int) -> np.ndarray:
        return fit_image(images[index], preprocessing, source=names[index], resize=resize)

    return ImageSource(description=description, is_real=True, names=names, labels=labels, image_at=image_at, name=name)


def checked_labels(labels: np.ndarray, *, n_images: int, n_classes: int, source: str) -> np.ndarray:
    """Return the labels as int64 [n_images]; a wrong dtype, length or class number is a DataError."""
    if labels.dtype.kind not in "iu" or labels.shape != (n_images,):
        raise DataError(
            f"{source}, array 'y': got {labels.dtype} {list(labels.shape)}, expected whole numbers [{n_images}], "
            "one label for each image in x. Save y with an integer dtype and that length"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if wrong.size:
        raise DataError(
            f"{source}, array 'y': label {labels[wrong[0]]} of image {wrong[0]} is not in 0 to {n_classes - 1}, the "
            f"classes of the model ({wrong.size} such labels). Use the model's class numbers, from 0 on; "
            "`bdtool train pretrain --classes N` makes a model of N classes"
        )
    return labels.astype(np.int64)


def _checked_images(images: np.ndarray, *, path: Path) -> np.ndarray:
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and 0 not in images.shape[1:]:
        return images
    hint = "Save 8-bit RGB pixels"
    if images.ndim == 4 and images.shape[1] == 3:
        hint = "Channels come last: save x.transpose(0, 2, 3, 1)"
    elif images.ndim == 3 and images.shape[2] == 3:
        hint = "One image needs a batch axis: save x[None]"
    raise DataError(f"{path}, array 'x': got {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 3]. {hint}")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):  # of which numpy says that it may be a pickle
                raise ValueError("it is no zip archive, or cut short")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:  # bytes where it is no array
                return {name: np.asarray(file[name]) for name in ("x", "y") if name in file}
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror or exc}); {_EXPECTED}") from exc
    except Exception as exc:  # on damaged files numpy and zipfile raise almost anything: RuntimeError, TokenError
        raise DataError(f"{path}: not a readable .npz file ({exc}); {_EXPECTED}. Write it again with np.savez") from exc

"""Pictures made from numbers, for timing and smoke tests where no real images are at hand."""

from __future__ import annotations

import numpy as np

_MEAN, _MEAN_SPREAD = 0.45, 0.10  # brightness of a picture, and how it varies from picture to picture
_CONTRAST_LOW, _CONTRAST_HIGH = 0.12, 0.34
_CHROMA = 0.5  # colour varies less than brightness in photographs
_FALLOFF = 1.6  # with it neighbouring pixels correlate by 0.9, as in CIFAR-10's test images
_PIXEL_NOISE = 0.02


def synthetic_images(n: int, *, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return deterministic pictures, uint8 [n, height, width, 3], with statistics like those of photographs.

    Over many pictures the mean is about 0.45 and the standard deviation about 0.25 of the full range. Picture i depends
    on `seed` and i only, so a smaller n gives the first pictures of a larger one.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    return np.stack([synthetic_image(index, height=height, width=width, seed=seed) for index in range(n)])


def synthetic_image(index: int, *, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return picture number `index` of that seed, uint8 [height, width, 3]: colour fields, texture and pixel noise."""
    rng = np.random.default_rng([seed, index])
    light = _random_field(rng, height, width)
    colour = np.stack([_random_field(rng, height, width) for _ in range(3)], axis=-1)
    mean = rng.normal(_MEAN, _MEAN_SPREAD)
    contrast = rng.uniform(_CONTRAST_LOW, _CONTRAST_HIGH)
    noise = rng.normal(0.0, _PIXEL_NOISE, (height, width, 3))
    picture = mean + contrast * (light[..., None] + _CHROMA * colour) + noise
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)


def _random_field(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a field [height, width] of mean 0 and deviation 1 whose amplitude falls with the frequency.

    Source: Field, "Relations between the statistics of natural images", JOSA A 1987. Differs: steeper than the 1 / f of
    whole scenes, because a small field drawn alone lacks the waves that are longer than itself.
    """
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no constant part: the picture's brightness is drawn apart
    field = np.fft.irfft2(spectrum / frequency**_FALLOFF, s=(height, width))
    return np.asarray(field / max(float(field.std()), 1e-12))

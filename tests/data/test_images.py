"""Image files become RGB, and every picture gets the network's input size as torchvision would."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from bdtool.data.images import fit_image, read_image
from bdtool.errors import DataError
from bdtool.specs import Preprocessing

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def preprocessing(height: int, width: int, **others: Any) -> Preprocessing:
    return Preprocessing(height=height, width=width, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), **others)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_rgb_png_is_read_unchanged(tmp_path: Path) -> None:
    pixels = read_image(saved(Image.fromarray(COLOURS), tmp_path / "a.png"))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, COLOURS)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA"])
def test_opaque_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    pixels = read_image(saved(image, tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_are_refused(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    image.putalpha(127)
    with pytest.raises(DataError, match=rf"a\.png: got mode {mode} .*alpha down to 127.*save it as RGB"):
        read_image(saved(image, tmp_path / "a.png"))


def test_transparent_palette_colour_is_refused(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 40, 50, 60])
    with pytest.raises(DataError, match="got mode P with transparent pixels"):
        read_image(saved(image, tmp_path / "a.png", transparency=0))


def test_cmyk_becomes_what_torchvision_makes_of_it(tmp_path: Path) -> None:
    path = saved(Image.fromarray(COLOURS).convert("CMYK"), tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(path), np.asarray(default_loader(str(path))))


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("F", "tif"), ("LAB", "tif")])
def test_modes_without_safe_conversion_are_refused(tmp_path: Path, mode: str, suffix: str) -> None:
    with pytest.raises(DataError, match=f"a.{suffix}: got mode {mode}, .*Save it as 8-bit RGB"):
        read_image(saved(Image.new(mode, (4, 4)), tmp_path / f"a.{suffix}"))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    pixels = read_image(saved(image, tmp_path / "a.png", exif=exif))
    np.testing.assert_array_equal(pixels, np.rot90(COLOURS, k=-1))


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_exif_orientation_is_that_of_pillow(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = orientation
    path = saved(image, tmp_path / "a.png", exif=exif)
    with Image.open(path) as file:
        np.testing.assert_array_equal(read_image(path), np.asarray(ImageOps.exif_transpose(file)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_picture_with_damaged_exif_is_read_as_it_lies(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(COLOURS)
    plain = read_image(saved(image, tmp_path / f"plain.{suffix}"))
    damaged = saved(image, tmp_path / f"damaged.{suffix}", exif=b"Exif\0\0damaged")
    np.testing.assert_array_equal(read_image(damaged), plain)


def test_picture_is_turned_whatever_the_other_exif_tags_are(tmp_path: Path) -> None:
    """Pillow cannot write a resolution that is a text, but reads it."""
    tags = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + b"\x01\x1a\0\x02\0\0\0\x04abc\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + tags + bytes(4)
    path = saved(Image.fromarray(COLOURS), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(COLOURS, k=-1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif"])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}: "):
        read_image(path)


@settings(max_examples=60)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_damaged_file_gives_pixels_or_data_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = saved(Image.fromarray(COLOURS), tmp_path_factory.mktemp("damaged") / "a.png")
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(DataError):  # and no other error
        assert read_image(path).shape[2] == 3


def test_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("hello")
    with pytest.raises(DataError, match=r"a\.png: not a picture in a known format.*JPEG"):
        read_image(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")


@pytest.mark.parametrize("limit", [40, 20])  # Pillow warns above its limit, and raises above twice its limit
def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = saved(Image.fromarray(COLOURS), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"a\.png: refused as a decompression bomb"):
        read_image(path)


@settings(max_examples=80)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    crop=st.tuples(st.integers(1, 48), st.integers(1, 48)),
    resize=st.integers(1, 48),
    how=st.sampled_from(["bilinear", "bicubic"]),
)
def test_fit_equals_torchvision_resize_and_centre_crop(
    size: tuple[int, int], crop: tuple[int, int], resize: int, how: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    scale = transforms.Resize(resize, transforms.InterpolationMode(how))
    oracle = transforms.Compose([scale, transforms.CenterCrop(crop)])
    fitted = fit_image(pixels, preprocessing(*crop, resize=resize, interpolation=how), source="a")
    np.testing.assert_array_equal(fitted, np.asarray(oracle(Image.fromarray(pixels))))


def test_fit_keeps_pixels_that_already_fit() -> None:
    np.testing.assert_array_equal(fit_image(COLOURS, preprocessing(6, 8), source="a", resize=False), COLOURS)


def test_fit_refuses_another_size_and_shows_the_option() -> None:
    expected = r"cat\.png: got 8 x 6 pixels, the model takes 32 x 32\. Pass --resize to scale the shorter side"
    with pytest.raises(DataError, match=expected):
        fit_image(COLOURS, preprocessing(32, 32), source="cat.png")


def test_fit_resizes_on_request_as_torchvision_does() -> None:
    oracle = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])
    fitted = fit_image(COLOURS, preprocessing(32, 32), source="a", resize=True)
    np.testing.assert_array_equal(fitted, np.asarray(oracle(Image.fromarray(COLOURS))))


@pytest.mark.parametrize("size", [(24, 32), (32, 24)])
def test_fit_covers_an_input_that_is_not_square(size: tuple[int, int]) -> None:
    white = np.full((5, 7, 3), 255, dtype=np.uint8)
    fitted = fit_image(white, preprocessing(*size), source="a", resize=True)
    assert fitted.shape == (*size, 3)
    assert fitted.min() == 255  # no black padding


@pytest.mark.parametrize(("size", "length"), [((1, 9000), 256), ((40, 30), 100_000)])
def test_fit_refuses_to_blow_up_a_picture(size: tuple[int, int], length: int) -> None:
    expected = f"with its shorter side scaled to {length} it would have .*, at most 100000000 are made. Crop it, or"
    with pytest.raises(DataError, match=expected):
        fit_image(np.zeros((*size, 3), dtype=np.uint8), preprocessing(224, 224, resize=length), source="a")

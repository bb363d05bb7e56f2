"""Pictures that the project may ship, because it draws them: four of CIFAR-10's classes, labelled.

Each is drawn large and scaled to 32 x 32, with its own colours, place and size. They are no photographs: accuracy on
them says that the pipeline works, not how good the network is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from bdtool.models.checkpoint_formats import CIFAR10_LABELS

_SIZE = 256  # drawn at eight times the size, so that scaling down smooths the edges
_Colour = tuple[int, int, int]
_Points = Sequence[tuple[float, float]]


class _Canvas:
    """Draws in a frame of 100 x 100 units, moved and scaled as a whole, with the colours of one random generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.image = Image.new("RGB", (_SIZE, _SIZE))
        self._draw = ImageDraw.Draw(self.image)
        self._scale = _SIZE / 100 * rng.uniform(0.85, 1.05)
        self._shift = rng.uniform(-6, 6, 2)
        self._mirror = rng.random() < 0.5

    def shade(self, red: int, green: int, blue: int, spread: int = 18) -> _Colour:
        values = np.clip(np.array([red, green, blue]) + self.rng.integers(-spread, spread + 1, 3), 0, 255)
        return int(values[0]), int(values[1]), int(values[2])

    def ground(self, top: _Colour, bottom: _Colour, horizon: float) -> None:
        """Fill the picture with a sky that brightens downwards, and with `bottom` below `horizon`."""
        rows = np.linspace(0, 1, _SIZE)[:, None]
        sky = np.array(top) * (1 - 0.25 * rows) + 255 * 0.25 * rows
        sky[int(horizon * _SIZE / 100) :] = bottom
        pixels = np.broadcast_to(sky[:, None, :], (_SIZE, _SIZE, 3))
        noise = self.rng.normal(0, 6, (_SIZE // 8, _SIZE // 8, 1)).repeat(8, axis=0).repeat(8, axis=1)
        self.image.paste(Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)))

    def polygon(self, points: _Points, colour: _Colour) -> None:
        self._draw.polygon([self._place(x, y) for x, y in points], fill=colour)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: _Colour) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def disc(self, x: float, y: float, radius: float, colour: _Colour) -> None:
        angles = np.linspace(0, 2 * np.pi, 40)
        self.polygon([(x + radius * float(np.cos(a)), y + radius * float(np.sin(a))) for a in angles], colour)

    def wheel(self, x: float, y: float, radius: float) -> None:
        self.disc(x, y, radius, (22, 22, 24))
        self.disc(x, y, radius * 0.5, (150, 150, 155))

    def _place(self, x: float, y: float) -> tuple[float, float]:
        x = 100 - x if self._mirror else x
        across, down = (np.array([x, y]) - 50 + self._shift) * self._scale + _SIZE / 2
        return float(across), float(down)


def _airplane(c: _Canvas) -> None:
    c.ground(c.shade(110, 165, 225), c.shade(150, 190, 235), 100)
    body, dark = c.shade(225, 228, 232), c.shade(120, 125, 135)
    c.polygon([(8, 52), (16, 46), (80, 44), (94, 48), (80, 55), (18, 58)], body)
    c.polygon([(14, 47), (8, 26), (17, 26), (30, 46)], c.shade(190, 40, 45))
    c.polygon([(40, 52), (24, 78), (34, 78), (60, 53)], dark)
    c.polygon([(44, 45), (36, 30), (42, 30), (58, 45)], dark)
    c.polygon([(84, 46), (91, 47), (88, 49), (82, 49)], (40, 50, 70))


def _automobile(c: _Canvas) -> None:
    c.ground(c.shade(190, 205, 215), c.shade(115, 115, 118), 62)
    paint, glass = c.shade(185, 30, 35, 30), c.shade(60, 75, 90)
    c.polygon([(6, 56), (12, 48), (28, 45), (38, 32), (66, 32), (78, 46), (93, 50), (95, 68), (6, 68)], paint)
    c.polygon([(33, 45), (41, 35), (51, 35), (51, 46)], glass)
    c.polygon([(54, 35), (64, 35), (72, 46), (54, 46)], glass)
    c.rectangle(6, 64, 95, 69, c.shade(60, 20, 22))
    c.rectangle(90, 52, 95, 57, (250, 240, 190))
    c.wheel(26, 69, 9)
    c.wheel(75, 69, 9)


def _ship(c: _Canvas) -> None:
    c.ground(c.shade(150, 190, 225), c.shade(35, 80, 125), 66)
    c.polygon([(6, 58), (94, 56), (84, 74), (16, 74)], c.shade(40, 45, 60))
    c.polygon([(14, 68), (88, 68), (84, 74), (16, 74)], c.shade(160, 40, 40))
    c.rectangle(24, 46, 74, 58, c.shade(240, 240, 240, 10))
    c.rectangle(34, 36, 64, 47, c.shade(235, 235, 235, 10))
    c.rectangle(46, 22, 55, 37, c.shade(200, 60, 40))
    for x in range(28, 72, 7):
        c.rectangle(x, 50, x + 3, 53, (70, 90, 120))


def _truck(c: _Canvas) -> None:
    c.ground(c.shade(195, 210, 220), c.shade(105, 105, 108), 66)
    c.rectangle(4, 24, 64, 66, c.shade(235, 235, 230))
    c.rectangle(4, 60, 64, 66, c.shade(90, 90, 95))
    cab = c.shade(40, 80, 165, 30)
    c.polygon([(66, 34), (84, 34), (92, 50), (95, 52), (95, 70), (66, 70)], cab)
    c.polygon([(72, 38), (82, 38), (88, 50), (72, 50)], (50, 62, 78))
    c.rectangle(4, 66, 95, 71, (45, 45, 50))
    for x in (17, 31, 82):
        c.wheel(x, 72, 8)


_DRAWINGS: dict[str, Callable[[_Canvas], None]] = {
    "airplane": _airplane,
    "automobile": _automobile,
    "ship": _ship,
    "truck": _truck,
}


def drawn_pictures(n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures uint8 [n, 32, 32, 3] and labels int64 [n], CIFAR-10's class numbers; the classes take turns."""
    names = [list(_DRAWINGS)[i % len(_DRAWINGS)] for i in range(n)]
    pictures = np.stack([_drawn(_DRAWINGS[name], np.random.default_rng([seed, i])) for i, name in enumerate(names)])
    return pictures, np.array([CIFAR10_LABELS.index(name) for name in names])


def _drawn(drawing: Callable[[_Canvas], None], rng: np.random.Generator) -> np.ndarray:
    canvas = _Canvas(rng)
    drawing(canvas)
    small = canvas.image.filter(ImageFilter.GaussianBlur(2)).resize((32, 32), Image.Resampling.LANCZOS)
    return np.asarray(small)

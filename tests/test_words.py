"""Figures and names as people read them."""

import pytest

from bdtool import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (words.counted(1, "image"), "1 image"),
        (words.counted(0, "image"), "0 images"),
        (words.counted(2, "int8 engine"), "2 int8 engines"),
        (words.blocks(1), "1 block"),
        (words.blocks(7), "7 blocks"),
        (words.blocks(6.914), "6.91 blocks"),
        (words.percent(0.9164, 2), "91.64 %"),
        (words.listing([]), ""),
        (words.listing("abcdefgh"), "a, b, c, d, e, f, g, h"),
        (words.listing("abcdefghij"), "a, b, c, d, e, f, g, h and 2 more"),
        (words.milliseconds(9.9996), "10.000 ms"),
        (words.milliseconds(12.34), "12.3 ms"),
        (words.flops(0), "0.0 MFLOPs"),
        (words.flops(8_200), "8.2 kFLOPs"),
        (words.flops(4.1e9), "4.10 GFLOPs"),
    ],
)
def test_figures_and_names_are_told(text, expected):
    assert text == expected

"""The colours of classes in every picture and page, and the ink that is readable on them."""

from __future__ import annotations

from typing import NamedTuple

Colour = tuple[int, int, int]  # RGB, 0 to 255

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
# 60 colours, far from each other in OKLab: the first ten by hand, each of the others as far as possible from all before
_CLASSES = bytes.fromhex("""
1f77ff ff8c00 00b050 e6007e 00c8e6 ffd400 e02020 8a3ffc a4de02 9a5b2b ffb8ff 005870 f800ff 782878 9080b0 006000 00ffc8
a8a870 0000e8 e88090 4038a8 d068d8 ffc8b0 901030 389080 c0e8a0 a0b8ff a800c0 00ff00 0088c0 708010 9080f8 b05080 98f0f0
60c8a0 585018 ff38c8 8050b8 5000e0 6800b0 605080 b00888 90b018 00e068 c848ff c08800 50a0ff d86840 ff88d0 784050 5068c0
c8a0c8 e8b860 ff5070 d098ff 286850 b07878 088840 70a8c8 d89878""")
_COUNT = len(_CLASSES) // 3


class Look(NamedTuple):
    """Colours of a figure's text, frame, main line and ground, as matplotlib takes them."""

    ink: str
    soft: str
    accent: str
    paper: str


ON_WHITE = Look("#1f2933", "#5b6673", "#2456d6", "#ffffff")
ON_PAGE = Look("#010203", "#040506", "#070809", "#0a0b0c")  # placeholders for a page's colours, light or dark


def colour_of(label: int) -> Colour:
    """The colour of a class, by its label; those of 60 classes differ, then they repeat."""
    red, green, blue = _CLASSES[3 * (label % _COUNT) :][:3]
    return red, green, blue


def hex_of(colour: Colour) -> str:
    """A colour as `#rrggbb`."""
    return "#" + bytes(colour).hex()


def ink_on(ground: Colour) -> Colour:
    """Black or white, whichever has more contrast on `ground`: always 4.5 or more."""
    return max(BLACK, WHITE, key=lambda ink: contrast(ink, ground))


def contrast(one: Colour, other: Colour) -> float:
    """Contrast of two colours as WCAG 2 defines it, 1 to 21."""
    darker, lighter = sorted(map(_luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: Colour) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2 defines it."""
    shares = [value / 255 for value in colour]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

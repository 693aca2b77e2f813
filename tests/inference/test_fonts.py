import pytest
from PIL import Image

from dino.inference import fonts
from dino.inference.drawing import draw_detections

ODD = [
    "猫",
    "قطة",
    "एक",
    "😀 party",
    "𐀀",
    "x\x1b[31m\nred",
    "\u202eabc",
    "",
    "a" * 5000,
    "e" + "\u0301" * 300,
    "\ud800",
]


@pytest.fixture
def no_system_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "_system_fonts", list)
    fonts._covering.cache_clear()
    yield
    fonts._covering.cache_clear()


def test_letters_that_no_font_has_become_escapes(no_system_fonts):
    assert fonts.legible("猫 cat") == r"\u732b cat"
    assert fonts.legible("Zählwerk Ω Ж قطة") == "Zählwerk Ω Ж قطة"
    assert fonts.legible("a\nb") == r"a\nb"


@pytest.mark.parametrize("name", ODD)
def test_names_of_any_script_are_drawn(no_system_fonts, name):
    drawn = draw_detections(Image.new("RGB", (200, 100)), [[40, 40, 100, 90]], [1], [name + " 0.50"])
    assert drawn.getcolors(100_000)[0][0] < 200 * 100
    line = fonts.legible(name)
    assert all(ord(letter) in fonts._codes_of(fonts._bundled()) for letter in line)
    assert fonts.font_families([line]) == ["DejaVu Sans"]


def test_a_font_of_the_system_is_taken_for_letters_that_the_bundled_one_lacks(monkeypatch, tmp_path):
    other = tmp_path / "other.ttf"
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    other.write_bytes(fonts._bundled().with_name("STIXGeneral.ttf").read_bytes())
    letter = chr(min(fonts._codes_of(other) - fonts._codes_of(fonts._bundled())))
    monkeypatch.setattr(fonts, "_system_fonts", lambda: [broken, other])
    fonts._covering.cache_clear()
    assert fonts.legible(letter) == letter
    assert fonts.load_font(letter, 12).path == str(other)
    assert fonts.font_families(["a", letter]) == ["DejaVu Sans", "STIXGeneral"]
    fonts._covering.cache_clear()

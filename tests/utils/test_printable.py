import unicodedata

import pytest

from dino.utils.printable import _columns as columns_of
from dino.utils.printable import printable


@pytest.mark.parametrize("name", ["cat", "Größe", "图 1", "تصویر", "می\u200cروم", "a" * 60, "", "two words"])
def test_names_of_any_language_stay(name):
    assert printable(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("\ud800", r"\ud800"),
        ("\x9b31m", r"\x9b31m"),
        ("\u2028", r"\u2028"),
        (7, "7"),
    ],
)
def test_control_characters_become_escapes(name, shown):
    assert printable(name) == shown


def test_a_long_name_keeps_its_ends():
    assert printable("a" * 100 + ".png", 11) == "aaaaa….png"[:6] + "a.png"
    assert printable("a" * 10**6 + "z", 5) == "aa…az"
    assert printable("图" * 40, 11) == "图图…图图"


def test_no_character_of_unicode_breaks_a_line_or_its_width():
    for start in range(0, 0x110000, 64):
        text = "".join(map(chr, range(start, start + 64)))
        shown = printable(text, 40)
        assert columns_of(shown) <= 40
        assert not {unicodedata.category(letter) for letter in shown} & {"Cc", "Cs", "Zl", "Zp"}
        shown.encode("utf-8")
        assert len(shown.splitlines()) <= 1


def test_accents_without_end_are_cut():
    assert len(printable("e" + "\u0301" * 10**6, 20)) <= 60


def test_padding_counts_columns():
    assert printable("图", columns=4) + "|" == "图  |"
    assert printable("long", columns=2) == "long"


def test_texts_of_any_length():
    assert printable("a\x1b\nb" * 100, None, kept="\n") == "a\\x1b\nb" * 100

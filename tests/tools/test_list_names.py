"""docs/names.md follows the files in dino/migration."""

import pytest

from dino.migration import PROGRAMS, read_map
from dino.utils.files import UserError
from tests.tools.programs import load_program

tool = load_program("list_names")


@pytest.fixture(scope="module")
def page():
    return tool.page()


def test_the_page_is_up_to_date(page):
    assert tool.PAGE.read_text() == page, "run: python tools/list_names.py"


def test_every_setting_has_a_row(page):
    there = [name for name in PROGRAMS if (tool.DATA / f"{name}.toml").is_file()]
    assert "official" in there
    for program in there:
        name_map = read_map(program)
        part = page.partition(f"\n## {tool.heading(name_map)}\n")[2].partition("\n## ")[0]
        assert not [key for key in name_map.settings if f"\n| `{key}` |" not in part], program


def test_rows():
    settings = read_map("official").settings
    assert tool.row(settings["num_classes"])[:4] == ["`num_classes`", "`91`", "`model.num_classes`", "`80`"]
    assert tool.row(settings["enc_loss_coef"]) == ["`enc_loss_coef`", "`1.0`", "", "", "never read there"]
    assert tool.row(settings["unic_layers"])[4].startswith("left out: ")
    assert tool.row(settings["ema_epoch"])[4].startswith("missing: ")
    assert tool.row(settings["focal_alpha"])[3] == "`0.25`"
    assert "; `True` is `train.amp.enabled=True`, " in tool.row(settings["amp"])[4]
    assert tool.row(settings["config_file"])[1] == ""


def test_notes_begin_with_a_word(page):
    assert "| . " not in page


def test_check_finds_an_old_page(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "PAGE", tmp_path / "names.md")
    monkeypatch.setattr("sys.argv", ["list_names.py", "--check"])
    with pytest.raises(UserError, match="is out of date: run python"):
        tool.main()
    monkeypatch.setattr("sys.argv", ["list_names.py"])
    assert tool.main() == 0
    monkeypatch.setattr("sys.argv", ["list_names.py", "--check"])
    assert tool.main() == 0

import pytest
from PIL import Image

from dino import cli
from dino.weights.description import PARTS

from ..tiny import TinyBackbone
from .programs import ROOT, load_program

draw_pictures = load_program("draw_pictures")


@pytest.fixture
def in_this_process(monkeypatch):
    """Calls of programs, counted, without the seconds that each takes to start; a small backbone."""
    called = []

    def call(program, *words):
        called.append(program)
        words = list(map(str, words))
        if program == "-m":
            assert cli.main(words[1:]) == 0
        else:
            load_program(program.removeprefix("tools/").removesuffix(".py")).main(words)

    monkeypatch.setattr(draw_pictures, "call", call)
    monkeypatch.setitem(PARTS, "dino.modeling.TorchvisionBackbone", lambda **_: TinyBackbone())
    return called


def test_the_command_of_the_pages_at_small_size(in_this_process, tmp_path, monkeypatch):
    words = [f"--work={tmp_path / 'work'}", f"--output={tmp_path / 'pictures'}", "--images=21", "--epochs=0.2"]
    draw_pictures.main(words)
    assert in_this_process == ["tools/make_shapes.py", "tools/plain_train.py", "-m"]
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs/pictures").iterdir()}
    for name in drawn:
        with Image.open(tmp_path / "pictures" / name) as new, Image.open(ROOT / "docs/pictures" / name) as shown:
            assert new.size == shown.size
    monkeypatch.setattr(cli, "main", lambda words: 0)
    draw_pictures.main(words)
    assert in_this_process[3:] == ["-m"], "what is there is used again"

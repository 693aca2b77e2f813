import pytest
from PIL import Image

from dino.training import plain
from dino.weights.description import PARTS

from ..coco_files import write_coco
from ..tiny import TinyBackbone
from .programs import load_program


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Checkpoint, annotations and images of an untrained network."""
    monkeypatch.setitem(PARTS, "dino.modeling.TorchvisionBackbone", lambda **_: TinyBackbone())
    settings = plain.Settings(device="cpu", size=48, embed_dim=64, layers=1, queries=10)
    plain.save(tmp_path / "model.pth", plain.build(settings, ["red", "green", "blue"]), settings)
    files = write_coco(tmp_path / "data")
    return [str(tmp_path / "model.pth"), files.annotations, files.images]


def test_predictions_are_drawn_beside_the_truth(arguments, tmp_path, capsys):
    program = load_program("draw_predictions")
    program.main([*arguments, str(tmp_path / "all.png"), "--score-thresh=0"])
    assert capsys.readouterr().out == f"4 images drawn in {tmp_path / 'all.png'}\n"
    program.main([*arguments, str(tmp_path / "two.jpg"), "--image=image_3.png", "--image=image_1.png", "--title=Two"])
    with Image.open(tmp_path / "all.png") as every, Image.open(tmp_path / "two.jpg") as two:
        assert (every.format, two.format) == ("PNG", "JPEG")
        assert every.height > 1.5 * two.height


def test_an_unknown_image_is_named(arguments, tmp_path):
    with pytest.raises(SystemExit, match=r"error: 'absent\.png' is no file_name of the annotations"):
        load_program("draw_predictions").main([*arguments, str(tmp_path / "out.png"), "--image=absent.png"])
    assert not (tmp_path / "out.png").exists()

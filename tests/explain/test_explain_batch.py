import pytest
import torch
from PIL import Image

from dino import cli
from dino.explain.scenes import SCENES, _kinds_of
from dino.training import plain
from dino.weights.description import PARTS

from ..coco_files import write_coco
from ..tiny import TinyBackbone
from ..tools.programs import contents

PICTURES = {*SCENES, "noise"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Data, and a checkpoint of an untrained network for it."""
    monkeypatch.setitem(PARTS, "dino.modeling.TorchvisionBackbone", lambda **_: TinyBackbone())
    settings = plain.Settings(device="cpu", size=48, embed_dim=64, layers=2, queries=20)
    (tmp_path / "run").mkdir()
    plain.save(tmp_path / "run/model.pth", plain.build(settings, ["red", "green", "blue"]), settings)
    return write_coco(tmp_path / "data")


def explain(files, tmp_path, *words):
    weights = tmp_path / "run/model.pth"
    command = ["explain", files.annotations, files.images, f"--weights={weights}", f"--output={tmp_path / 'out'}"]
    return cli.main([*map(str, command), *words])


def test_pictures_of_a_batch(files, tmp_path, capsys):
    """The default batch holds images with 2 and 3 objects, so that there are slots without object.

    Drawn again, the pictures are the same: the noise has a seed.
    """
    assert explain(files, tmp_path) == 0
    assert capsys.readouterr().out == f"9 pictures written to {tmp_path / 'out'}\n"
    written = contents(tmp_path / "out")
    assert set(map(str, written)) == {f"{name}.png" for name in PICTURES}
    for name, content in written.items():
        assert len(content) < 150_000, name
        with Image.open(tmp_path / "out" / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").resize((40, 40)).getcolors()) > 5, f"{name} is empty"
    torch.manual_seed(1)
    assert explain(files, tmp_path) == 0
    assert contents(tmp_path / "out") == written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image=absent.png"], "'absent.png' is no file_name of the annotations; the first is 'image_1.png'"),
        (["--image=image_2.png"], "the image to be drawn has no objects"),
    ],
)
def test_wrong_images_are_named(files, tmp_path, capsys, words, message):
    assert explain(files, tmp_path, *words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_classes_are_refused(files, tmp_path, capsys):
    files.change(lambda content: content["categories"][0].update(name="pink"))
    assert explain(files, tmp_path) == 1
    assert "was trained for the classes ['red', 'green', 'blue']" in capsys.readouterr().err


def test_kinds_of_queries():
    """Two groups of two slots each half, of which the second is empty, and three matching queries."""
    assert _kinds_of(11, 8, 2, 1).tolist() == [0, 2, 1, 2, 0, 2, 1, 2, 3, 3, 3]

import json
from pathlib import Path

import pytest

pytest.importorskip("tqdm", reason="tqdm is not installed")

from dino.training import Settings
from dino.utils.files import UserError
from dino.weights.description import PARTS

from ..coco_files import write_coco
from ..tiny import TinyBackbone
from .programs import assert_one_error, load_program, run_program

plain_train = load_program("plain_train")

TINY = ["--device=cpu", "--workers=0", "--size=48", "--embed-dim=64", "--layers=1", "--queries=20", "--flips=both"]
TINY += ["--epochs=1", "--batch=2"]


@pytest.fixture
def sets(tmp_path):
    """Training and validation data, and the arguments that name them."""
    train, val = write_coco(tmp_path / "train"), write_coco(tmp_path / "val", seed=1)
    return train, val, [*data_arguments("train", train), *data_arguments("val", val)]


def data_arguments(split, files):
    return [f"--{split}-json", files.annotations, f"--{split}-images", files.images]


def test_arguments_reach_the_engine(sets, tmp_path, monkeypatch):
    """And the defaults are those of the engine."""
    calls = []
    monkeypatch.setattr(plain_train.plain, "train", lambda *files, **options: calls.append((files, options)))
    monkeypatch.setattr(plain_train.plain, "evaluate", lambda *files, **options: calls.append((files, options)))
    output = tmp_path / "run"
    plain_train.main([*sets[2], "--output", str(output), "--device=cpu", "--embed-dim=64", "--bf16", "--lr=0.1"])
    files, options = calls.pop()
    assert files == (*map(Path, (*sets[0], *sets[1])), output)
    assert options == {"weights": None, **Settings(device="cpu", embed_dim=64, bf16=True, lr=0.1)._asdict()}
    weights = tmp_path / "model.pth"
    plain_train.main([*data_arguments("val", sets[1]), "--eval-only", "--weights", str(weights), "--device=cpu"])
    files, options = calls.pop()
    assert files == (*map(Path, sets[1]), str(weights), Path("output/plain"))
    assert options == Settings(device="cpu")._asdict()


def test_training_and_evaluation_by_the_command(sets, tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "dino.modeling.TorchvisionBackbone", lambda **_: TinyBackbone())
    folder = tmp_path / "run"
    plain_train.main([*sets[2], *TINY, "--output", str(folder)])
    first = json.loads((folder / "metrics.json").read_text())
    words = ["--eval-only", "--weights", str(folder / "model.pth"), "--output", str(folder)]
    plain_train.main([*data_arguments("val", sets[1]), *TINY, *words])
    again = json.loads((folder / "evaluation/metrics.json").read_text())
    assert {**again, "training_seconds": 0} == {**first, "training_seconds": 0}


def test_missing_arguments_are_named(sets, tmp_path):
    with pytest.raises(UserError, match="give --val-json and --val-images, and to train also"):
        plain_train.main([*data_arguments("val", sets[1]), *TINY])
    with pytest.raises(UserError, match="give --val-json"):
        plain_train.main([*data_arguments("train", sets[0]), *TINY])
    with pytest.raises(UserError, match="--eval-only needs --weights"):
        plain_train.main([*sets[2], *TINY, "--eval-only"])


def test_a_bad_image_ends_the_program_with_one_line(sets, tmp_path):
    """It is found in a worker of the data loader, whose traceback is of no use to anybody."""
    for number in range(1, 5):
        (tmp_path / f"train/image_{number}.png").write_text("no image")
    words = [*sets[2], *TINY, "--workers", "1", "--output", tmp_path / "run"]
    result = run_program("plain_train", *words, folder=tmp_path)
    assert_one_error(result, "can't read image ")
    assert not (tmp_path / "run/model.pth").exists()


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        plain_train.main(["--help"])
    assert caught.value.code == 0
    assert "python tools/plain_train.py --train-json train.json" in capsys.readouterr().out

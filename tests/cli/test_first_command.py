"""From nothing to a picture: weights by name from the release host, which a server on this machine stands for."""

import io
import json

import pytest
import torch
from PIL import Image

from dino.inference.predictor import Predictor
from dino.modeling import TorchvisionBackbone, build_dino
from dino.weights import load_weights, locate
from dino.weights.published import PUBLISHED

from ..file_server import Reply
from ..tools.programs import run_verb
from ..weights.states import detrex_state, randomise

NAME = "dino_r50_4scale_12ep"
SIZES = {"embed_dim": 32, "hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 12}


@pytest.fixture
def release(server, tmp_path):
    """A small network under a published name, and a picture; -> variables of a process that reaches nothing else."""
    model = randomise(build_dino(backbone=TorchvisionBackbone("resnet18"), num_classes=80, **SIZES))
    weights, picture = io.BytesIO(), io.BytesIO()
    torch.save({"model": detrex_state(model)}, weights)
    Image.linear_gradient("L").save(picture, "PNG")
    server.files["/" + PUBLISHED[NAME].address.removeprefix("https://")] = Reply(weights.getvalue())
    server.files["/example.org/pictures/photo.png"] = Reply(picture.getvalue(), headers={"Content-Type": "image/png"})
    return {"DINO_MIRROR": server.url, "DINO_CACHE": str(tmp_path / "cache")}


def test_one_command_draws_a_picture(release, server, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    words = ["predict", NAME, "https://example.org/pictures/photo.png", "--score-thresh", "0", "--max-detections", "5"]
    result = run_verb(*words, folder=folder, **release)
    assert result.returncode == 0, result.stderr
    drawn = folder / "output/predictions"
    found = json.loads((drawn / "predictions.json").read_text())
    assert (len(found["categories"]), found["categories"][17]["name"], len(found["annotations"])) == (80, "horse", 5)
    assert Image.open(drawn / "photo.png").size == (256, 256)

    for name, value in release.items():
        monkeypatch.setenv(name, value)
    predictor = Predictor.from_pretrained(NAME)
    assert predictor.network.position_encoding.temperatures == (10000.0, 10000.0)  # of the table: no tensor shows it
    assert predictor.names[:2] == ["person", "bicycle"]
    again = build_dino(backbone=TorchvisionBackbone("resnet18"), num_classes=80, **SIZES)
    assert not load_weights(again, locate(NAME)).fresh
    assert sum(path.endswith(".pth") for path, _ in server.requests) == 1  # the cache serves all but the first

"""`dino convert-config`: the command to paste, what it lacks, and a recipe."""

import json
import shlex

import pytest

from dino import cli
from dino.training.recipe_reading import read_recipe
from dino.utils.overrides import apply
from tests.migration.official_files import SCRIPT, write_official


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("official"))


def run(capsys, *arguments):
    code = cli.main(["convert-config", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_a_published_run(capsys, folder):
    code, lines, _ = run(capsys, folder / "DINO_5scale.py", "--options", *SCRIPT)
    assert code == 0
    assert lines[0].endswith("DINO_5scale.py: the nearest recipe is dino_r50_5scale_12ep")
    assert lines[2] == "dino train dino_r50_5scale_12ep"
    (never,) = [line for line in lines if line.startswith("Never read by that program: ")]
    assert "dn_scalar" in never
    assert never.count(",") == 9 + 3 - 1


def test_the_command_can_be_pasted(capsys, folder):
    options = ["epochs=36", "multi_step_lr=true", "lr_drop_list=20,30", "masks=true", "ema_epoch=2", "odd=1"]
    _, lines, _ = run(capsys, "--options", *options, "--gpus", 4, "--", folder / "DINO_4scale_convnext.py")
    (command,) = [line for line in lines if line.startswith("dino train")]
    words = shlex.split(command)
    assert words[2] == "dino_convnext_l_4scale_12ep"
    cfg = apply(read_recipe(words[2]), words[3:])
    assert cfg.lr_multiplier.milestones == [20, 30]
    assert cfg.dataloader.train.total_batch_size == 8
    text = "\n".join(lines)
    for said in ("Left out:\n  masks=True: boxes", "Missing:\n  ema_epoch=2:", "No setting of that program:\n  odd=1:"):
        assert said in text


def test_a_recipe(capsys, folder, tmp_path):
    out = tmp_path / "mine.py"
    arguments = [folder / "DINO_4scale.py", "--options", "focal_alpha=0.3", "enc_layers=3"]
    _, lines, _ = run(capsys, *arguments)
    assert "Settings that no override can change, so the command lacks them: add --output mine.py" in lines
    assert "  model.criterion.alpha = 0.3" in lines
    code, lines, _ = run(capsys, *arguments, "--output", out)
    assert code == 0
    assert f"dino train {shlex.quote(str(out))}" in lines
    recipe = read_recipe(str(out))
    assert (recipe.model.network.encoder.num_layers, recipe.model.criterion.alpha) == (3, 0.3)
    code, _, err = run(capsys, *arguments, "--output", out)
    assert code == 1
    assert str(out) in err


def test_the_settings_of_a_run(capsys, tmp_path):
    path = tmp_path / "config_args_all.json"
    path.write_text(
        json.dumps({"modelname": "dino", "enc_layers": 3, "world_size": 8, "coco_path": "/data", "eval": False})
    )
    _, lines, _ = run(capsys, path)
    assert any("enc" in line and "num_layers=3" in line for line in lines)
    assert any(line.startswith("  coco_path=/data: dino train --train, dino train --val") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["absent.py"], "configuration file not found", 2),
        (["DINO_4scale.py", "--options", "x"], "--options takes KEY=VALUE, not 'x'", 2),
        (["DINO_4scale.py", "--gpus", "0"], "--gpus must be at least 1", 2),
        (["DINO_4scale.py", "--output", "mine.yaml"], "--output must end in .py", 2),
        (["DINO_4scale.py", "--options", "backbone=vgg"], "backbone='vgg'", 1),
    ],
)
def test_mistakes(capsys, monkeypatch, folder, arguments, message, code):
    monkeypatch.chdir(folder)
    try:
        found, _, err = run(capsys, *arguments)
    except SystemExit as end:
        found, err = end.code, capsys.readouterr().err
    assert found == code
    assert message in err
    assert err.count("\n") == 1

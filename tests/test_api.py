"""`dino.train` and `dino.evaluate`, on each road; a script without `if __name__`."""

import json
import sys

import pytest

import dino
from dino import api
from dino.utils.files import UsageError, UserError

from .coco_files import write_coco
from .tools.programs import run_python

SHRINK = {
    "model.network.neck.out_channels": 64,
    "model.network.encoder.num_layers": 1,
    "model.network.encoder.hidden_dim": 32,
    "model.network.decoder.num_layers": 2,
    "model.network.query_selection.num_queries": 20,
    "model.network.denoising.num_denoising": 8,
    "model.max_detections": 20,
    "dataloader.train.mapper.augmentations.5.sizes": [48],
    "dataloader.test.mapper.augmentations.0.sizes": [48],
    "dataloader.train.num_workers": 0,
    "dataloader.test.num_workers": 0,
    "log_period": 1,
    "ema": False,
    "max_iter": 2,
    "eval_period": 0,
}
ENGINES = [
    pytest.param("detectron2", marks=pytest.mark.skipif(api.find_spec("detectron2") is None, reason="no Detectron2")),
    "plain",
]


def write_two(folder, **options):
    train, val = (write_coco(folder / split, seed=n, **options) for n, split in enumerate(("train", "val")))
    return {"train": (train.annotations, train.images), "val": (val.annotations, val.images)}


@pytest.mark.parametrize("engine", ENGINES)
def test_train_then_predict_and_evaluate(tmp_path, engine):
    """Two trainings in one process, of other data and classes: the second knows nothing of the first."""
    write_two(tmp_path / "first")
    for name, ids in (("first", (1, 2, 3)), ("a b ü [1], #=", (7, 42))):
        data = write_two(tmp_path / name, category_ids=ids)
        run = tmp_path / name / "run"
        results = dino.train("dino_r18_small_data", **data, output=run, engine=engine, lr=2e-4, batch=2, **SHRINK)
        assert set(results["bbox"]) >= {"AP", "AP50", "AP-red", "AP-green"}
        assert (run / "model_final.pth").exists()
    detector = dino.load(run / "model_final.pth")
    assert (detector.names, detector.category_ids) == (["red", "green"], [7, 42])
    found = dino.Predictor(run / "model_final.pth", device="cpu", score_thresh=0)(f"{data['val'][1]}/image_1.png")
    assert {entry["category_id"] for entry in found.to_coco(image_id=1)} <= {7, 42}
    metrics = dino.evaluate(run / "model_final.pth", val=data["val"], output=tmp_path / "out", engine=engine)
    assert metrics == json.loads((tmp_path / "out/metrics.json").read_text())
    assert 100 * metrics["AP"] == pytest.approx(results["bbox"]["AP"], abs=1e-3)
    with pytest.raises(UserError, match=r"report\.html exists"):
        dino.evaluate(run / "model_final.pth", val=data["val"], output=tmp_path / "out", engine=engine)
    with pytest.raises(UserError, match=r"holds (a run|the checkpoints)"):
        dino.train("dino_r18_small_data", **data, output=run, engine=engine, **SHRINK)
    lines = (run / "metrics.json").read_text().splitlines()
    assert json.loads(lines[0])["lr"] > 0


def test_a_script_needs_no_guard(tmp_path):
    """With reading processes, and settings by bare words."""
    data = write_two(tmp_path)
    settings = {**SHRINK, "dataloader.train.num_workers": 1, "dataloader.test.num_workers": 1}
    (tmp_path / "mine.py").write_text(
        f"import dino\nprint('started')\n"
        f"r = dino.train('dino_r18_small_data', output='run', engine='plain', **{data!r}, **{settings!r})\n"
        "print(sorted(r))\n"
    )
    result = run_python("mine.py", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("started") == 1
    assert result.stdout.splitlines()[-1] == "['bbox']"


def overrides_of(monkeypatch, **arguments):
    """What `run` gets."""
    seen = {}
    monkeypatch.setattr(api, "run", lambda recipe, overrides, **options: seen.update(options, overrides=overrides))
    dino.train("dino_r18_small_data", engine="plain", **arguments)
    return seen


def test_settings_become_overrides(monkeypatch):
    given = {"epochs": 25, "lr": 1e-4, "batch": 4, "seed": 1, "device": "cpu", "ema": False, "max_iter": None}
    options = {"dataloader.test.mapper.augmentations.0.sizes": (48, 64), "output": "a b/c=d", "weights": "w.pth"}
    seen = overrides_of(monkeypatch, train=("t.json", "t"), val=["v.json", "v"], **given, **options)
    assert seen["overrides"] == [
        "train.epochs=25",
        "optimizer.lr=0.0001",
        "dataloader.train.total_batch_size=4",
        "train.seed=1",
        "train.device=cpu",
        "train.ema.enabled=False",
        "train.max_iter=null",
        "dataloader.test.mapper.augmentations.0.sizes=[48, 64]",
        "train.output_dir=a b/c=d",
        "train.init_checkpoint=w.pth",
    ]
    assert (seen["train"], seen["val"]) == (("t.json", "t"), ("v.json", "v"))
    assert overrides_of(monkeypatch)["train"] == (None, None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ephocs": 3}, UsageError, "no setting 'ephocs'; the nearest is 'train.epochs'"),
        ({"epochs": "three"}, UsageError, "train.epochs must be a number, not 'three'"),
        ({"recipe": "dino_r81"}, UserError, "recipe not found: 'dino_r81'"),
        ({"train": "train.json"}, UserError, r"train must be a pair such as \(\"train.json\", \"images\"\)"),
        ({"val": ("a", "b", "c")}, UserError, "val must be a pair"),
        ({"engine": "fast"}, UserError, "engine must be one of auto, detectron2, plain, not 'fast'"),
        ({"recipe": ""}, UserError, "write dino.train"),
        ({"train": ("gone.json", "images"), "val": ("gone.json", "images")}, UserError, "gone.json"),
    ],
)
def test_one_clear_error(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        dino.train(**{"recipe": "dino_r18_small_data", "engine": "plain", **arguments})
    assert not list(tmp_path.iterdir())


def test_pairs_have_names():
    with pytest.raises(UserError, match=r"write dino.train\(\"RECIPE\", train="):
        dino.train("dino_r18_small_data", ("train.json", "images"), ("val.json", "images"))


def test_the_former_train(tmp_path, monkeypatch):
    """Five paths, in order or by name, as before there were recipes in Python."""
    seen = []
    monkeypatch.setattr("dino.training.plain.train", lambda *paths, **options: seen.append((paths, options)))
    dino.train("t.json", "t", "v.json", "v", "out", weights="w.pth", epochs=3)
    dino.train("t.json", "t", "v.json", "v", output="out", epochs=3)
    named = {"train_json": "t.json", "train_images": "t", "val_json": "v.json", "val_images": "v", "output": "out"}
    dino.train(**named)
    assert seen == [
        (("t.json", "t", "v.json", "v", "out"), {"weights": "w.pth", "epochs": 3}),
        (("t.json", "t", "v.json", "v"), {"output": "out", "epochs": 3}),
        ((), named),
    ]


def test_the_engine_is_chosen(monkeypatch):
    for installed in (True, False):
        monkeypatch.setattr(api, "find_spec", lambda name, installed=installed: installed or None)
        assert api.choose_engine("auto") == ("detectron2" if installed else "plain")
        assert api.choose_engine("plain") == "plain"
    with pytest.raises(UserError, match="engine detectron2 needs Detectron2, which is not installed here"):
        api.choose_engine("detectron2")
    with pytest.raises(UserError, match="several processes needs Detectron2"):
        api.run("dino_r18_small_data", processes={"num_gpus": 2})


def test_names_are_found_late():
    """`dino` itself imports nothing."""
    code = "import sys, dino, dino.api\nassert dino.train and dino.evaluate\nprint('torch' in sys.modules)"
    result = run_python("-c", code, folder=".")
    assert result.stdout.strip() == "False", result.stderr
    assert set(dino.__all__) <= set(dir(dino))
    assert callable(dino.load)
    assert sys.modules["dino.api"].train is dino.train

"""Typing mistakes: each gives one line with the nearest right form, and exit code 2. Nothing is written."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dino import cli
from dino.cli import eval, explain, train
from dino.utils import paths

from ..tools.programs import contents

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
RECIPE = "dino_r18_small_data"
DATA = "--train train.json images --val val.json images"
HELP = "; see `dino {} --help`"

# command -> the line that is printed after "error: "
MISTAKES = {
    # verbs
    "pedict model.pth photo.jpg": "no verb 'pedict'; the nearest is 'predict'; see `dino --help`",
    "Train x": "no verb 'Train'; the nearest is 'train'; see `dino --help`",
    "test output/mine val.json images": "no verb 'test'; the nearest is 'eval'; see `dino --help`",
    "--train x": "no verb '--train'; the nearest is 'train'; see `dino --help`",
    "photo.jpg": "'photo.jpg' is no verb: write dino VERB photo.jpg, for example dino predict CHECKPOINT IMAGE; see "
    "`dino --help`",
    "help pedict": "no verb 'pedict'; the nearest is 'predict'; see `dino --help`",
    # flags
    f"train {RECIPE} {DATA} --ouput x": "no argument --ouput; the nearest is --output" + HELP.format("train"),
    "predict model.pth photo.jpg --score_thresh 0.3": "no argument --score_thresh; the nearest is --score-thresh"
    + HELP.format("predict"),
    "predict model.pth photo.jpg --Output x": "no argument --Output; the nearest is --output" + HELP.format("predict"),
    f"train {RECIPE} --zzz": "no argument --zzz" + HELP.format("train"),
    "predict model.pth photo.jpg --tile big": "--tile must be a whole number, not 'big'" + HELP.format("predict"),
    "predict model.pth photo.jpg --score-thresh 40": "--score-thresh must lie between 0 and 1, not 40"
    + HELP.format("predict"),
    "predict model.pth photo.jpg --compile=yes": "--compile takes no value, not 'yes'" + HELP.format("predict"),
    "export model.pth net.onnx --size 640": "--size takes HEIGHT WIDTH" + HELP.format("export"),
    "export model.pth net.onnx --format onxn": "--format has no 'onxn'; the nearest is onnx: there are onnx, "
    "torch-export, torchscript" + HELP.format("export"),
    "export model.pth net.onx": "OUT has none of the suffixes .onnx, .pt2, .ts, .torchscript: give --format"
    + HELP.format("export"),
    "convert model.pth own.pth --to onw": "--to has no 'onw'; the nearest is own: there are own, official, detrex, "
    "huggingface, mmdetection, safetensors" + HELP.format("convert"),
    "predict model.pth": "missing: INPUT (dino predict CHECKPOINT INPUT...)" + HELP.format("predict"),
    "check train.json": "missing: IMAGES (dino check ANNOTATIONS IMAGES)" + HELP.format("check"),
    "check train.json images more": "'more' is one argument too many" + HELP.format("check"),
    "data improt x y": "dino data has no 'improt'; the nearest is import: there are import, merge, split"
    + HELP.format("data"),
    f"train {RECIPE} --resume --overwrite": "--resume and --overwrite exclude each other" + HELP.format("train"),
    f"train {RECIPE} --train train.json": "--train takes ANNOTATIONS IMAGES" + HELP.format("train"),
    # settings
    f"train {RECIPE} {DATA} SOLVER.MAX_ITER 5": "'SOLVER.MAX_ITER' is no setting: write train.max_iter=5",
    f"train {RECIPE} {DATA} a.b[5].sizes=[96]": "write a.b.5.sizes=[96], an index without brackets",
    f"train {RECIPE} {DATA} --epochs 3": "no argument --epochs: write train.epochs=3" + HELP.format("train"),
    f"train {RECIPE} {DATA} --lr=1e-4": "no argument --lr: write optimizer.lr=1e-4" + HELP.format("train"),
    f"train {RECIPE} {DATA} --train.epochs=3": "no argument --train.epochs: write train.epochs=3"
    + HELP.format("train"),
    f"train {RECIPE} {DATA} --batch-size 8": "no argument --batch-size: write dataloader.train.total_batch_size=8"
    + HELP.format("train"),
    f"train {RECIPE} {DATA} train.epochs 3": "write train.epochs=3",
    f"train {RECIPE} {DATA} train.epochs = 3": "write train.epochs=3, without spaces",
    f"train {RECIPE} {DATA} train.epochs= 3": "write train.epochs=3, without spaces",
    f"train {RECIPE} {DATA} train.epochs =3": "write train.epochs=3, without spaces",
    f"train {RECIPE} {DATA} train.output_dir=my run": "'run' is no override; for a value with spaces, write "
    '"train.output_dir=my run", in quotes',
    f"train {RECIPE} {DATA} more": "'more' is no override: write key=value",
    # recipes
    "train": "name a recipe: dino train RECIPE, for example dino_r18_small_data",
    "train train.epochs=3": "name a recipe: dino train RECIPE, for example dino_r18_small_data",
    "train dino_r18_smal_data": "recipe not found: 'dino_r18_smal_data'; the nearest is dino_r18_small_data",
    "train mine.p": "recipe not found: 'mine.p'; the nearest there is mine.py",
    "train train.json": "train.json is no recipe: write dino train RECIPE --train train.json IMAGES",
    "train model.pth": "model.pth is a checkpoint, no recipe: write dino train RECIPE --weights model.pth",
    "train data.yaml": "data.yaml is no recipe: it has the keys train, names, but no model. It describes a YOLO data "
    "set: `dino data import` reads its folder",
    "train images": "images is a folder without the config.yaml of a run: name a recipe",
    # checkpoints
    "predict photo.jpg model.pth": "the checkpoint comes first: write dino predict model.pth photo.jpg",
    "eval val.json images model.pth": "the checkpoint comes first: write dino eval model.pth val.json images",
    "explain train.json images model.pth": "the checkpoint comes first: write dino explain model.pth train.json images",
    "predict modle.pth photo.jpg": "weights not found: modle.pth; the nearest there is model.pth",
    "predict output/mine/model_0100.pth photo.jpg": "weights not found: output/mine/model_0100.pth; the nearest there "
    "is output/mine/model_0000100.pth",
    "predict dino_r50_4scale_12epp photo.jpg": "weights not found: dino_r50_4scale_12epp. Did you mean "
    "dino_r50_4scale_12ep or dino_r50_5scale_12ep or dino_r50_4scale_24ep? See `dino weights`",
    f"predict {RECIPE} photo.jpg": f"weights not found: {RECIPE}. {RECIPE} is a recipe: `dino train` makes a "
    "checkpoint from it",
    "predict mine.py photo.jpg": "mine.py is a recipe, not a checkpoint, such as model_final.pth",
    "predict images photo.jpg": "weights not found: images: this folder holds no checkpoint (model_best.pth, "
    "model_final.pth, model_0000499.pth; of transformers config.json and model.safetensors)",
    "predict train.json photo.jpg": "train.json is a JSON file, not a checkpoint, such as model_final.pth",
    "predict photo.jpg photo.jpg": "photo.jpg is a picture, not a checkpoint, such as model_final.pth",
    f"train {RECIPE} {DATA} --weights mine.py": "mine.py is a recipe, not a checkpoint, such as model_final.pth",
    # data
    "check images train.json": "the annotations come before the images: write dino check train.json images",
    f"train {RECIPE} --train images train.json --val val.json images": "the annotations come before the images: write "
    "--train train.json images",
    "check trian.json images": "annotations not found: trian.json; the nearest there is train.json",
    "check train.json image": "image folder not found: image; the nearest there is images",
    "check train.json photo.jpg": "image folder can't be the file photo.jpg: name a folder, such as .",
    "check sets images": "annotations can't be the folder sets: name a file, such as sets/all.json",
    "check absent/train.json images": "annotations not found: absent/train.json",
    "check model.pth images": "annotations are a JSON file in COCO format, not model.pth",
    "check train.json images --val vla.json": "annotations not found: vla.json; the nearest there is val.json",
    "eval model.pth": "name the data too: dino eval CHECKPOINT ANNOTATIONS IMAGES" + HELP.format("eval"),
    "eval": "name a checkpoint and data: dino eval CHECKPOINT ANNOTATIONS IMAGES" + HELP.format("eval"),
    "eval model.pth val.json": "the data are two words, not val.json: write dino eval CHECKPOINT ANNOTATIONS IMAGES, "
    "and settings as key=value",
    "eval --results detections.json val.json images": "detections not found: detections.json",
    "explain model.pth train.json": "write dino explain CHECKPOINT ANNOTATIONS IMAGES: three arguments, not 2",
    f"train {RECIPE} --train train.json images": "--train without --val: give validation data of the same classes too: "
    "--val ANNOTATIONS IMAGES",
    f"train {RECIPE} --train-json train.json --val val.json images": "--train-json and --train-images belong together: "
    "give both",
    "predict model.pth foto.jpg": "input not found: foto.jpg; the nearest there is photo.jpg",
    "predict model.pth photo.jpeg": "input not found: photo.jpeg; the nearest there is photo.jpg",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files as people have them; none of them is read."""
    paths.say_once.cache_clear()
    for name in ("train.json", "val.json", "sets/all.json", "photo.jpg", "images/1.png", "mine.py", "model.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "output/mine").mkdir(parents=True)
    (tmp_path / "output/mine/model_0000100.pth").write_text("")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, capsys):
    """-> exit code, lines of the error."""
    try:
        code = cli.main(shlex.split(command))
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("command", "line"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_gives_one_line(folder, capsys, command, line):
    before = contents(folder)
    assert run(command, capsys) == (2, [f"error: {line}"])
    assert contents(folder) == before


def test_mistakes_are_found_before_libraries_are_loaded(folder):
    """In a process of its own: no torch, no Detectron2."""
    code = f"""
import shlex, sys
from dino import cli
for command in {list(MISTAKES)}:
    try:
        cli.main(shlex.split(command))
    except SystemExit:
        pass
print([name for name in ("torch", "numpy", "detectron2", "matplotlib", "PIL", "omegaconf") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr


@pytest.mark.parametrize("verb", cli.VERBS)
@pytest.mark.parametrize("form", ["help {}", "{} help", "{} -h"])
def test_every_way_to_ask_for_help(capsys, verb, form):
    with pytest.raises(SystemExit) as caught:
        cli.main(form.format(verb).split())
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: dino {verb}")


@pytest.mark.parametrize("command", ["help", "--help", "-h"])
def test_help_of_all_verbs(capsys, command):
    assert cli.main([command]) == 0
    assert capsys.readouterr().out.startswith("usage: dino VERB")


@pytest.mark.parametrize(
    ("command", "hidden", "line"),
    [
        ("predict model.pth clip.mp4", "cv2", "video needs OpenCV (cv2): pip install opencv-python-headless"),
        ("predict model.pth 0", "cv2", "video needs OpenCV (cv2): pip install opencv-python-headless"),
        ("export model.pth net.onnx", "onnx", "ONNX needs onnx: pip install 'dino-detectron2[onnx]'"),
        (
            "eval model.pth --dataset coco_2017_val",
            "detectron2",
            "--dataset names data that Detectron2 knows, and it is not installed: give ANNOTATIONS IMAGES",
        ),
        (
            f"train {RECIPE} --engine detectron2",
            "detectron2",
            "--engine detectron2 needs Detectron2, which is not installed: docs/quick_start.md says how",
        ),
    ],
)
def test_missing_packages_are_named_before_the_work(folder, capsys, monkeypatch, command, hidden, line):
    """model.pth is no checkpoint: nobody has read it when the message appears."""
    (folder / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, hidden, None)
    assert run(command, capsys) == (1, [f"error: {line}"])


def test_arguments_stand_in_any_order(folder):
    """Flags between the words, both forms of every argument."""
    words = {
        f"{RECIPE} {DATA} optimizer.lr=1 --resume train.epochs=2",
        f"optimizer.lr=1 --resume {DATA} {RECIPE} train.epochs=2",
        f"--resume optimizer.lr=1 train.epochs=2 --config-file {RECIPE} {DATA}",
        f"--config-file={RECIPE} --train-json train.json --train-images images --val-json val.json --val-images images "
        "--resume optimizer.lr=1 train.epochs=2",
    }
    fields = ("config_file", "train_json", "train_images", "val_json", "val_images", "resume", "opts")
    found = [train.parse(command.split()) for command in words]
    assert {tuple(map(str, (getattr(args, name) for name in fields))) for args in found} == {
        (RECIPE, "train.json", "images", "val.json", "images", "True", "['optimizer.lr=1', 'train.epochs=2']")
    }
    forms = [
        "model.pth val.json images a=1",
        "model.pth --val val.json images a=1",
        "--weights model.pth val.json images a=1",
    ]
    forms += ["--weights=model.pth a=1 --val-json val.json --val-images images", "a=1 model.pth --val val.json images"]
    found = [eval._parse(command.split()) for command in forms]
    assert {(args.weights, args.val_json, args.val_images, *args.opts) for args in found} == {
        ("model.pth", "val.json", "images", "a=1")
    }
    found = [explain._parse(c.split()) for c in ("model.pth val.json images", "val.json images --weights model.pth")]
    assert {(args.weights, args.annotations, args.images) for args in found} == {("model.pth", "val.json", "images")}


def test_the_folder_of_a_run_stands_for_its_checkpoint(folder, capsys):
    assert eval._parse(["output/mine", "val.json", "images"]).weights == "output/mine/model_0000100.pth"
    assert capsys.readouterr().err == "output/mine: taking model_0000100.pth\n"

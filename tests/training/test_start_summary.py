import numpy as np
import pytest

from dino.training.start_summary import (
    MOST_LINES,
    Plan,
    Split,
    best_line,
    closing_lines,
    evaluation_lines,
    percent,
    start_lines,
)

TRAIN = Split(205, 3, {"RBC": 2381, "WBC": 214, "Platelets": 209})
VAL = Split(1, 0, {"RBC": 12, "WBC": 1, "Platelets": 0})
RATES = {"backbone": 2e-5, "the rest": 2e-4}
PLAN = Plan(4, 1040, 52, 52, RATES, "float32", "cpu", "plain PyTorch: it is not built", tensorboard=True)
SIZES = np.linspace(10, 110, 101)


def test_the_summary_of_a_training():
    lines = start_lines(
        "dino_r18_small_data", TRAIN, VAL, SIZES, PLAN, "random", "output/my run", ["no training image shows cat"]
    )
    assert lines == [
        "training dino_r18_small_data",
        "  train      205 images, 3 of them without objects; 2,804 objects of 3 classes: RBC 2,381, WBC 214,",
        "             Platelets 209",
        "  validate   1 image, 0 of them without objects; 13 objects",
        "  sizes      objects of 60 pixels after the resize (median; 5% below 15, 5% above 105)",
        "  length     1,040 iterations of 4 images = 20 epochs; an evaluation every 52",
        "  rate       2e-05 (backbone), 0.0002 (the rest)",
        "  runs on    cpu, float32; attention operator: plain PyTorch: it is not built",
        "  weights    random",
        "  writes     output/my run, every detail to log.txt in it",
        "  look at    output/my run/train_batch.png after the first iteration: do the boxes fit?",
        "             output/my run/curves.png after each evaluation",
        "             tensorboard --logdir 'output/my run'",
        "warning: no training image shows cat",
    ]


def test_the_summary_is_short_whatever_it_says():
    many = Split(118_287, 1021, {f"class number {n}": n + 1 for n in range(365)})
    long = "words " * 100
    plan = PLAN._replace(device=long, rates={f"part {n}": 1e-4 for n in range(40)}, start=3)
    warnings = [f"warning {n} about\nsomething \x1b[31mred" for n in range(60)]
    lines = start_lines(long, many, many, SIZES, plan, long, "output", warnings)
    assert len(lines) == MOST_LINES == 25
    assert lines[-1].endswith("more warnings are in log.txt")
    assert len(lines[0]) < 80
    shown = sum("about" in line for line in lines)
    assert lines[-1] == f"warning: {60 - shown} more warnings are in log.txt"
    assert not any(ord(letter) < 32 for line in lines for letter in line)
    text = " ".join(line.strip() for line in lines)
    assert "of 365 classes: class number 364 365, class number 363 364," in text


def test_a_resumed_run_says_where_it_starts():
    lines = start_lines("x", TRAIN, VAL, np.empty(0), PLAN._replace(start=520, eval_period=0), "random", "output")
    assert (
        "  length     1,040 iterations of 4 images = 20 epochs; starts at iteration 520; an evaluation at the end"
        in lines
    )


def test_tensorboard_is_named_where_it_has_files():
    lines = start_lines("x", TRAIN, VAL, SIZES, PLAN._replace(tensorboard=False), "random", "output")
    assert not [line for line in lines if "tensorboard" in line]


def test_an_evaluation_is_three_lines():
    raw = {"AP": 49.04, "AP50": 66.66, "AP75": 53.5, "APs": 1.0, "AP-RBC": 98.04, "AP-WBC": float("nan")}
    averaged = {**raw, "AP": 50.0}
    assert evaluation_lines({"bbox": raw, "ema": {"bbox": averaged}}) == [
        "raw weights       AP 49.0  AP50 66.7  AP75 53.5",
        "averaged weights  AP 50.0  AP50 66.7  AP75 53.5",
        "AP by class  RBC 98.0  WBC undefined",
    ]
    assert evaluation_lines({"bbox": {"AP": 49.04, "AP-RBC": 49.04}}) == ["raw weights  AP 49.0"]
    many = {"AP": 1.0, **{f"AP-{n}": 1.0 for n in range(11)}}
    assert evaluation_lines({"bbox": many}) == ["raw weights  AP 1.0"]
    assert evaluation_lines({}) == []


def test_the_last_lines_name_the_next_commands(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    results = {"bbox": {"AP": 48.0}, "ema": {"bbox": {"AP": 49.04}}}
    (folder / "model_final.pth").touch()
    assert closing_lines(folder, results, ("my val.json", "images"))[:2] == [
        "AP 49.0 at the end",
        f"best weights: {folder}/model_final.pth",
    ]
    (folder / "model_best.pth").touch()
    assert closing_lines(folder, results, ("my val.json", "images"), best=51.26) == [
        "AP 49.0 at the end",
        f"best weights: {folder}/model_best.pth, AP 51.3",
        "next:",
        f"  dino predict '{folder}' photo.jpg",
        f"  dino eval '{folder}' 'my val.json' images",
    ]
    assert closing_lines(folder, {})[0] == f"best weights: {folder}/model_best.pth"


def test_new_best_weights_are_named_by_their_metric():
    assert best_line("bbox/AP", 49.04, "raw") == "best bbox/AP so far: 49.0, raw weights, in model_best.pth"
    assert best_line("loss", 0.012349, "raw") == "best loss so far: 0.01235, raw weights, in model_best.pth"


@pytest.mark.parametrize(
    ("value", "text"), [(48.96, "49.0"), (0.0, "0.0"), (-1.0, "undefined"), (float("nan"), "undefined")]
)
def test_percent(value, text):
    assert percent(value) == text

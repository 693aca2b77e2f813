import json

import pytest
from PIL import Image

from dino.training import curves


def write_metrics(folder, *entries, end=""):
    (folder / "metrics.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)


def texts(figure):
    """All that can be read in a figure."""
    figure.draw_without_rendering()
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        found += [axes.get_title(), *axes.get_legend_handles_labels()[1], *(text.get_text() for text in axes.texts)]
    return found


def evaluation(iteration, ap, names=(), prefix=""):
    values = {"bbox/AP": ap, "bbox/AP50": 1.5 * ap, **{f"bbox/AP-{name}": ap + k for k, name in enumerate(names)}}
    return {"iteration": iteration, **{prefix + key: value for key, value in values.items()}}


def test_each_evaluation_is_one_point(tmp_path):
    """metrics.json has the last one under the number of all iterations, the others one lower."""
    write_metrics(tmp_path, evaluation(9, 30.0), evaluation(20, 40.0))
    (tmp_path / "evaluations.json").write_text(json.dumps([evaluation(10, 30.0), evaluation(20, 40.0)]))
    assert curves.read_series(tmp_path)["bbox/AP"] == {9: 30.0, 19: 40.0}


def test_curves(tmp_path):
    losses = [{"iteration": n, "total_loss": 20.0 / (n + 1), "loss_ce": 1.0, "lr": 1e-4} for n in range(5)]
    write_metrics(tmp_path, *losses, {"iteration": 4, "bbox/AP": 3.0, "ema/bbox/AP": float("nan")}, end='{"iterat')
    assert curves.read_series(tmp_path)["bbox/AP"] == {4: 3.0}
    curves.draw_curves(tmp_path)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1200, 760)
    assert not list(tmp_path.glob("*.part"))


def test_evaluations_that_only_their_own_file_has(tmp_path):
    """Metrics of an iteration whose checkpoint was written before its evaluation."""
    write_metrics(tmp_path, {"iteration": 499, "total_loss": 2.0})
    (tmp_path / "evaluations.json").write_text('[{"iteration": 500, "bbox/AP": 41.0, "bbox/APs": null}, 3, {}]')
    assert curves.read_series(tmp_path) == {"total_loss": {499: 2.0}, "bbox/AP": {499: 41.0}}
    assert "best: AP 41.0, iteration 500" in texts(curves.curves_figure(curves.read_series(tmp_path), ""))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{", b"3", b"[" * 100_000, b'{"iteration": 3}'])
def test_a_damaged_record_does_not_stop_the_drawing(tmp_path, content):
    (tmp_path / "evaluations.json").write_bytes(content)
    (tmp_path / "metrics.json").write_bytes(b'{"iteration": 1, "total_loss": 2}\n' + content)
    curves.draw_curves(tmp_path)
    assert curves.read_series(tmp_path) == {"total_loss": {1: 2}}


def test_only_a_checkpoint_in_a_run_has_curves(tmp_path):
    assert curves.run_curves(None) is None
    assert curves.run_curves("dino_r50_4scale_12ep") is None
    (tmp_path / "model.pth").touch()
    assert curves.run_curves(tmp_path / "model.pth") is None
    write_metrics(tmp_path, {"iteration": 9, "total_loss": 2.0})
    assert curves.run_curves(tmp_path / "model.pth").get_suptitle() == tmp_path.name
    assert curves.run_curves(tmp_path).get_suptitle() == tmp_path.name
    assert curves.run_curves(tmp_path / "other.pth") is None


def test_a_run_that_logged_nothing(tmp_path):
    curves.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").is_file()
    assert texts(curves.curves_figure({}, "empty")).count("no values yet") == 4


def read(folder, *entries):
    write_metrics(folder, *entries)
    return curves.read_series(folder)


def test_the_best_evaluation_is_marked_whichever_weights_it_has(tmp_path):
    entries = [evaluation(9, 20.0), evaluation(9, 31.25, prefix="ema/"), evaluation(19, 30.0)]
    shown = texts(curves.curves_figure(read(tmp_path, *entries), "a run"))
    assert "best: AP 31.2, iteration 10" in shown
    assert "AP, highest: 30.0" in shown
    assert "AP of averaged weights, highest: 31.2" in shown
    assert shown[0] == "a run"


@pytest.mark.parametrize("count", [2, 60])
def test_few_classes_are_named_and_of_many_the_ends(tmp_path, count):
    names = [f"name {k}" for k in range(count)]
    figure = curves.curves_figure(read(tmp_path, evaluation(9, 20.0, names), evaluation(19, 30.0, names)), "", names)
    shown = texts(figure)
    assert "name 0: 30.0" in shown
    assert f"name {count - 1}: {30 + count - 1:.1f}" in shown
    assert ("52 classes between them" in shown) == (count == 60)
    assert len([text for text in shown if text.startswith("name ")]) == min(count, 8)


def test_colours_of_classes_are_those_of_the_pictures(tmp_path):
    names = ["zebra", "ant"]  # metrics.json sorts them
    figure = curves.curves_figure(read(tmp_path, evaluation(9, 20.0, sorted(names))), "", names)
    colours = {line.get_label().split(":")[0]: line.get_color() for line in figure.axes[3].lines}
    assert colours == {name: curves.hex_of(curves.colour_of(label)) for label, name in enumerate(names)}


def test_a_hundred_thousand_points_are_drawn_as_their_means(tmp_path):
    series = {"total_loss": {20 * n: 5.0 + n % 2 for n in range(100_000)}}
    figure = curves.curves_figure(series, "")
    line = figure.axes[0].lines[0]
    assert len(line.get_xdata()) <= 1500
    assert line.get_ydata() == pytest.approx(5.5, abs=0.02)
    assert figure.axes[0].get_xlim()[1] > 1_999_980


def test_names_of_any_script_and_formulas_are_text(tmp_path):
    names = ["猫", "قط", "_hidden", "$\\frac{", "a\nb", "x" * 300]
    folder = tmp_path / "run $x_ 猫"
    folder.mkdir()
    write_metrics(folder, evaluation(9, 20.0, names))
    curves.draw_curves(folder, names)
    assert (folder / "curves.png").is_file()
    assert all(len(text) < 60 for text in texts(curves.curves_figure(read(folder, evaluation(9, 2.0, names)), "")))

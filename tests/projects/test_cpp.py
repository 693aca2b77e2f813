"""The C++ example: its package by AOTInductor, its program by CMake, its detections beside the predictor's."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dino import Predictor
from dino.cli import report_errors
from dino.data.images import resize_image
from dino.export.export_wrapper import Fixed, describe
from dino.modeling.detector import Preprocessing
from tests.tools.programs import ROOT, load_program, run_python
from tests.weights.folders import write_own

FOLDER = "projects/dino/cpp"
SOURCE = (ROOT / FOLDER / "main.cpp").read_text()
TORCH = Path(torch.__file__).parent
make_package = load_program("make_package", FOLDER)
needs_tools = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="no cmake or no g++")


def test_metadata_are_texts_that_the_program_reads():
    about = describe(["red", "dark\ngreen", ""], [0.5, 0.25, 0.5], Preprocessing(), Fixed(1, 480, 640))
    found = make_package.to_metadata(about)
    assert found == {
        "names": "red\ndark green\nclass 2",
        "thresholds": "0.5\n0.25\n0.5",
        "height": "480",
        "width": "640",
    }
    files = {make_package.NETWORK, *make_package.OPERATOR}
    assert set(re.findall(r'about\.at\("(\w+)"\)', SOURCE)) == set(found)
    assert set(re.findall(r'folder \+ "/([\w.]+)"', SOURCE)) == files


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.pth", "package", "--size", 64, 85], "absent.pth"),
        (["absent.pth", ".", "--size", 64, 85], ". exists: choose another name"),
    ],
)
def test_mistakes_are_one_error(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_package.operator, "verdict", lambda device: Verdict(True))
    assert report_errors(lambda: make_package.main([*map(str, words)])) > 0
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_compiled_operator_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_package.operator, "verdict", lambda device: Verdict(False, "it is not built"))
    words = ["model.pth", str(tmp_path / "package"), "--size", "64", "85"]
    assert report_errors(lambda: make_package.main(words)) == 1
    assert "the compiled attention operator is needed, but it is not built" in capsys.readouterr().err


class Verdict(NamedTuple):
    usable: bool
    reason: str = ""


def test_the_resizing_is_that_of_pillow():
    """Within a unit of 255: what main.cpp calls."""
    assert "at::_upsample_bilinear2d_aa(picture, {size.height, size.width}, /*align_corners=*/false)" in SOURCE
    pixels = np.random.default_rng(0).integers(256, size=(97, 131, 3), dtype=np.uint8)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for size in [(64, 85), (200, 270), (97, 50)]:
        found = torch.ops.aten._upsample_bilinear2d_aa(picture, list(size), False)[0].permute(1, 2, 0)
        difference = np.abs(found.numpy().astype(int) - resize_image(pixels, size))
        assert difference.max() <= 1


def build(folder, source=ROOT / FOLDER):
    for words in (["-S", source, "-B", folder, f"-DTORCH={TORCH}"], ["--build", folder]):
        result = subprocess.run(["cmake", *map(str, words)], capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def detections(text):
    """(score, box, name) of each line."""
    rows = [line.split(" ", 5) for line in text.splitlines()]
    return [(float(score), np.array(box, float), name) for score, *box, name in rows]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with checkpoint, package and program, made by the commands of the page."""
    found = make_package.operator.verdict(torch.device("cpu"))
    if not found.usable:
        pytest.skip(f"no compiled attention operator: {found.reason}")
    folder = tmp_path_factory.mktemp("cpp")
    torch.manual_seed(0)
    write_own(folder / "model.pth")
    words = (ROOT / FOLDER / "make_package.py", "model.pth", "package", "--size", 64, 85, "--score-thresh", 0.05)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    result = run_python(*words, folder=folder, **cache)
    assert result.returncode == 0, result.stdout + result.stderr
    build(folder / "build")
    return folder


def run_detect(folder, *words):
    return subprocess.run([folder / "build/detect", *words], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_tools
@pytest.mark.parametrize("size", [(96, 128), (64, 85), (300, 400)])
def test_detections_are_those_of_the_predictor(built, size):
    pixels = np.random.default_rng(sum(size)).integers(256, size=(6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize(size[::-1])  # smooth: resizing by torch and Pillow agrees
    picture.save(built / "picture.ppm")
    expected = Predictor(built / "model.pth", score_thresh=0.05)(built / "picture.ppm")
    result = run_detect(built, "package", "picture.ppm")
    assert result.returncode == 0, result.stderr
    found = detections(result.stdout)
    assert len(found) == len(expected) > 3
    for score, box, name in zip(expected.scores.tolist(), expected.boxes.numpy(), expected.names, strict=True):
        near = [d for d in found if d[2] == name and abs(d[0] - score) < 1e-3 and np.abs(d[1] - box).max() < 0.1]
        assert near, (score, box, name)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_tools
def test_bad_files_are_one_error(built):
    (built / "text.ppm").write_text("no picture")
    (built / "short.ppm").write_bytes(b"P6\n# a comment\n8 8\n255\nabc")
    for words, code, message in [
        (("package", "absent.ppm"), 1, "absent.ppm: no binary PPM file"),
        (("package", "text.ppm"), 1, "text.ppm: no binary PPM file"),
        (("package", "short.ppm"), 1, "short.ppm: the file ends early"),
        (("absent", "short.ppm"), 1, "absent/_deform_attn_schema.so"),
        (("package",), 2, "usage: detect"),
    ]:
        result = run_detect(built, *words)
        assert result.returncode == code, result.stderr
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


@needs_tools
def test_a_folder_without_torch_is_named(tmp_path):
    words = ["cmake", "-S", ROOT / FOLDER, "-B", tmp_path, f"-DTORCH={tmp_path}"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no PyTorch in" in result.stderr  # CMake breaks long lines


PAGE = ROOT / "docs/serving.md"


def test_the_commands_of_the_page():
    """Files exist, and flags are those of the programs."""
    page = PAGE.read_text()
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)).replace("\\\n", " ")
    serve = (ROOT / "projects/dino/serving/serve.py").read_text()
    programs = {"serve.py": serve, "make_package.py": (ROOT / FOLDER / "make_package.py").read_text()}
    seen = set()
    for path, words in re.findall(r"(projects/\S+\.py)(.*)", blocks):
        assert (ROOT / path).is_file(), path
        seen.add(Path(path).name)
        for flag in re.findall(r"--[\w-]+", words.partition(" #")[0]):
            assert f'"{flag}"' in programs[Path(path).name], flag
    assert seen == set(programs)
    assert f"cmake -S {FOLDER} -B" in blocks
    for flag in re.findall(r'"(--[\w-]+)"', serve):
        assert f"`{flag}" in page, flag


def test_the_figures_of_the_page():
    result = json.loads((ROOT / "benchmarks/results/cpp_cpu_1thread.json").read_text())["milliseconds"]
    expected = [(t["processor"], result["eager"]["processor"] / t["processor"], t["wall"]) for t in result.values()]
    found = re.findall(r"^\| .+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.M)
    assert found == [(f"{processor:.1f}", f"{ratio:.3g}", f"{wall:.0f}") for processor, ratio, wall in expected]

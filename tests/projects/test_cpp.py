"""The C++ example: its package by AOTInductor, its program by CMake, its detections beside the predictor's."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino import Predictor, cli
from dino.cli import report_errors
from dino.data.images import resize_image
from dino.export.export_wrapper import Fixed, describe
from dino.modeling.detector import Preprocessing, resized_size
from tests.tools.programs import ROOT, load_program, run_python
from tests.weights.folders import write_own

FOLDER = "projects/dino/cpp"
SOURCE = (ROOT / FOLDER / "main.cpp").read_text()
TORCH = Path(torch.__file__).parent
make_package = load_program("make_package", FOLDER)
needs_tools = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="no cmake or no g++")


def metadata(fixed=None, **sizes):
    return make_package.to_metadata(describe(["red", "dark green"], [0.5, 0.25], Preprocessing(**sizes), fixed))


@pytest.mark.parametrize("fixed", [None, Fixed(1, 480, 640)])
def test_metadata_are_texts_that_the_program_reads(fixed):
    about = metadata(fixed, max_size=None)
    assert (about["names"], about["thresholds"]) == ("red\ndark green", "0.5\n0.25")
    rule = {"fit_height": "480", "fit_width": "640"} if fixed else {"short_side": "800", "max_size": "0"}
    assert about.items() >= rule.items()
    assert all(f'"{key}"' in SOURCE for key in about)


def test_a_program_of_another_origin_is_refused(tmp_path, capsys):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "other.pt2")
    words = [str(tmp_path / "other.pt2"), str(tmp_path / "package.pt2")]
    assert report_errors(lambda: make_package.main(words)) == 1
    assert "other.pt2 has no description: it was not written by `dino export`" in capsys.readouterr().err
    assert report_errors(lambda: make_package.main([words[0], "package.bin"])) == 1
    assert "torch wants a name that ends in .pt2" in capsys.readouterr().err


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


HARNESS = """
#define main detect_main
#include "main.cpp"
#undef main
#include <iostream>
int main() {
  int64_t height, width, side, most;
  while (std::cin >> height >> width >> side >> most) {
    const Metadata about{{"short_side", std::to_string(side)}, {"max_size", std::to_string(most)}};
    const Size size = resized_size(about, {height, width});
    std::cout << size.height << " " << size.width << "\\n";
  }
}
"""


@pytest.mark.slow
@needs_tools
def test_sizes_are_those_of_the_detector(tmp_path):
    shutil.copytree(ROOT / FOLDER, tmp_path / "source")
    (tmp_path / "source/main.cpp").rename(tmp_path / "source/original.cpp")
    (tmp_path / "source/main.cpp").write_text(HARNESS.replace('"main.cpp"', '"original.cpp"'))
    program = build(tmp_path / "build", tmp_path / "source") / "detect"
    draw = np.random.default_rng(0).integers
    cases = [(*draw(1, 5000, 2).tolist(), draw(2, 1200), draw(0, 2) * draw(1200, 2000)) for _ in range(5000)]
    cases += [(1, 65535, 800, 1333), (65535, 1, 800, 0), (800, 800, 800, 1333), (1333, 2, 800, 1333)]
    lines = "\n".join(" ".join(map(str, case)) for case in cases)
    found = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.split("\n")
    expected = [" ".join(map(str, resized_size(h, w, side, most or None))) for h, w, side, most in cases]
    assert found[:-1] == expected


def detections(text):
    """(score, box, name) of each line."""
    rows = [line.split(" ", 5) for line in text.splitlines()]
    return [(float(score), np.array(box, float), name) for score, *box, name in rows]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with checkpoint, package and program, made by the commands of the page."""
    folder = tmp_path_factory.mktemp("cpp")
    write_own(folder / "model.pth")
    export = ["export", folder / "model.pth", folder / "mine.pt2", "--size", 64, 85, "--score-thresh", 0.05]
    assert cli.main([*map(str, export)]) == 0
    words = (ROOT / FOLDER / "make_package.py", "mine.pt2", "mine_package.pt2")
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
    pixels = np.random.default_rng(sum(size)).integers(256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(built / "picture.ppm")
    expected = Predictor(built / "model.pth", score_thresh=0.05)(built / "picture.ppm")
    result = run_detect(built, "mine_package.pt2", "picture.ppm")
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
        (("mine_package.pt2", "absent.ppm"), 1, "absent.ppm: no binary PPM file"),
        (("mine_package.pt2", "text.ppm"), 1, "text.ppm: no binary PPM file"),
        (("mine_package.pt2", "short.ppm"), 1, "short.ppm: the file ends early"),
        (("absent.pt2", "short.ppm"), 1, "absent.pt2"),
        (("mine_package.pt2",), 2, "usage: detect"),
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

import subprocess
import sys
from pathlib import Path

import pytest

from dino.utils import recipes
from dino.utils.files import UserError
from dino.utils.paths import PathError

ROOT = Path(recipes.__file__).parents[2]


def test_recipes_are_found_by_name_and_by_path():
    path = ROOT / "configs/dino_r50_4scale_12ep.py"
    assert recipes.find_recipe("dino_r50_4scale_12ep") == path
    assert recipes.find_recipe("dino_r50_4scale_12ep.py") == path
    assert recipes.find_recipe(str(path)) == path
    assert recipes.find_recipe("dino_r18_small_data") == ROOT / "projects/dino/configs/dino_r18_small_data.py"
    assert recipes.find_recipe("look_once") == ROOT / "projects/dino/configs/ablation/look_once.py"
    assert "base" not in recipes.recipes()


def test_no_two_recipes_have_one_name():
    files = [path for folder in recipes._FOLDERS for path in (ROOT / folder).glob("*.py")]
    assert len(recipes.recipes()) == len([path for path in files if path.stem != "base"]) > 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", ": name one, such as dino_r18_small_data"),
        ("dino_r50_4scale_12", "; the nearest is dino_r50_4scale_12ep"),
        ("Dino-R50-4scale-12ep", "; the nearest is dino_r50_4scale_12ep"),
        ("configs/dino_r50_4scale_12", "; the nearest is dino_r50_4scale_12ep"),
        ("common", ": give a file or a name, such as dino_r18_small_data, dino_r50_4scale_12ep"),
        ("../configs", ": give a file or a name, such as dino_r18_small_data, dino_r50_4scale_12ep"),
    ],
)
def test_the_nearest_name_is_offered(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        recipes.find_recipe(name)
    assert str(caught.value) == f"recipe not found: {name!r}{message}"


def test_the_folder_of_a_run_stands_for_its_recipe(tmp_path):
    with pytest.raises(PathError, match=r"without the config\.yaml of a run"):
        recipes.find_recipe(str(tmp_path))
    (tmp_path / "config.yaml").write_text("dataloader: {a: 1}\nmodel: {b: 1}\n")
    assert recipes.find_recipe(str(tmp_path)) == tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.json", "{}", "is no recipe: write dino train RECIPE --train "),
        ("net.pth", "", "is a checkpoint, no recipe: write dino train RECIPE --weights "),
        ("photo.jpg", "", "is no recipe, which ends in .py or .yaml"),
        ("data.yaml", "path: .\ntrain: a\nnames: [x]\n", "keys path, train, names, but no model. It describes a YOLO"),
        ("yacs.yaml", "MODEL:\n  A: 1\n", "but no model. It is of Detectron2's older system"),
        ("other.yml", "a: 1\n", "is no recipe: it has the keys a, but no model"),
    ],
)
def test_other_files_are_no_recipes(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(PathError) as caught:
        recipes.find_recipe(str(tmp_path / name))
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as for a wheel, without the compiled operator."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder / "dino"


def test_an_installed_package_carries_them(installed, monkeypatch):
    """Detectron2 reads the copy."""
    monkeypatch.setattr(recipes, "_PACKAGE", installed)
    found = recipes.find_recipe("dino_r18_shapes")
    assert found == installed / "recipe_files/projects/dino/configs/dino_r18_shapes.py"
    assert not list(installed.rglob("__pycache__"))
    assert recipes.find_recipe("look_once").is_relative_to(installed)
    config = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    assert config.LazyConfig.load(str(found)).model.max_detections == 50


def test_an_installed_package_carries_the_templates(installed):
    names = {path.name for path in (ROOT / "dino/evaluation/report/templates").iterdir()}
    assert {path.name for path in (installed / "evaluation/report/templates").iterdir()} == names


def test_an_installed_package_carries_the_maps_of_names(installed):
    names = {path.name for path in (ROOT / "dino/migration").glob("*.toml")}
    assert "official.toml" in names
    assert {path.name for path in (installed / "migration").glob("*.toml")} == names

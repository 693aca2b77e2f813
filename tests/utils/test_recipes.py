import subprocess
import sys
from pathlib import Path

import pytest

from dino.utils import recipes
from dino.utils.files import UserError

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


@pytest.mark.parametrize("name", ["", "dino_r50_4scale_12", "configs/dino_r50_4scale_12", "common", "../configs"])
def test_the_nearest_names_are_offered(name):
    with pytest.raises(UserError, match=r"recipe not found: .* one of these names: .*dino_r50_4scale_12ep"):
        recipes.find_recipe(name)


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

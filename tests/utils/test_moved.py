"""Old module paths lead to the very modules that took their place."""

import importlib
import importlib.util
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dino
from dino.utils.moved import _MOVED, _Finder

ROOT = Path(__file__).parents[2]
NEEDS_DETECTRON2 = [name for name, target in _MOVED.items() if target.startswith("dino.d2")]
# Names in checkpoints, saved recipes and programs of before the modules moved: class paths of descriptions, `_target_`
# and `!!python/name:` of config.yaml, and what the documentation showed. Module -> attributes.
STORED = {
    "dino.build": "build",
    "dino.files": "DataError",
    "dino.layers": "ContrastiveDenoising HungarianMatcher MultiScaleDeformableAttention Reweighting SetCriterion "
    "SinePositionEncoding deform_attn deform_attn_reference",
    "dino.layers.criterion": "SetCriterion",
    "dino.layers.denoising": "ContrastiveDenoising",
    "dino.layers.matcher": "HungarianMatcher",
    "dino.layers.position_encoding": "SinePositionEncoding",
    "dino.layers.reweighting": "Reweighting",
    "dino.layers.structures": "Target",
    "dino.modeling": "ChannelMapper CudaGraphs DINO Decoder Encoder QuerySelection TimmBackbone TorchvisionBackbone "
    "build_dino compile_network share_heads",
    "dino.modeling.backbones": "TimmBackbone TorchvisionBackbone",
    "dino.modeling.build": "build_dino",
    "dino.modeling.neck": "ChannelMapper",
    "dino.modeling.network": "DINO",
    "dino.modeling.transformer": "Decoder Encoder QuerySelection",
    "dino.modeling.variants": "FinalCriterion LearnedPositionEncoding LearnedQueries LookForwardOnce "
    "ObjectnessCriterion PatternSelection PlacedEncoder PositiveDenoising PureSelection SeparateCriterion "
    "ShiftDenoising",
    "dino.predictor": "Predictor",
    "dino.rebuild": "model_from_checkpoint",
    "dino.recipes": "find_recipe",
    "dino.weights": "convert load_weights read_content",
}
STORED_OF_D2 = {
    "dino.d2": "DINODetector add_dino_config build_adamw",
    "dino.d2.backbones": "AsBackbone regnet vitdet",
    "dino.d2.data": "Evaluator OneOf ShortSide TestMapper TrainMapper dataset",
    "dino.d2.detector": "DINODetector",
    "dino.d2.optim": "layerwise_params tenth_for_backbone tenth_for_backbone_and_offsets",
    "dino.d2.predictor": "InstancesPredictor",
    "dino.d2.sampler": "TrainLoader",
    "dino.d2.tiles": "TiledDetector",
    "dino.d2.tta": "AugmentedDetector",
}


def needs_detectron2(names):
    for name in names:
        missing = importlib.util.find_spec("detectron2") is None
        yield pytest.param(name, marks=pytest.mark.skipif(missing, reason="Detectron2 is not installed"))


def run_python(*words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [*sorted(set(_MOVED) - set(NEEDS_DETECTRON2)), *needs_detectron2(NEEDS_DETECTRON2)])
def test_old_paths_lead_to_the_modules_themselves(name):
    old, new = importlib.import_module(name), importlib.import_module(_MOVED[name])
    assert old is new
    assert sys.modules[name] is new
    assert new.__name__ == new.__spec__.name == _MOVED[name]


def test_the_table_is_sound():
    """No path leads to another old one, no old path hides a module that exists, and every target exists."""
    assert not set(_MOVED) & set(_MOVED.values())
    for old, new in _MOVED.items():
        assert not (ROOT / f"{old.replace('.', '/')}.py").exists(), old
        assert not (ROOT / old.replace(".", "/") / "__init__.py").exists(), old
        path = ROOT / new.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), new


@pytest.mark.parametrize("module", [*STORED, *needs_detectron2(STORED_OF_D2)])
def test_stored_names_lead_to_the_objects_in_use(module):
    """Not to copies: the module that an object names as its home holds the same object."""
    for name in {**STORED, **STORED_OF_D2}[module].split():
        found = getattr(importlib.import_module(module), name)
        assert callable(found)
        assert getattr(importlib.import_module(found.__module__), found.__name__) is found
        assert found.__module__ not in _MOVED


@pytest.mark.parametrize("path", [*needs_detectron2(["dino.d2.optim.tenth_for_backbone"])])
def test_yaml_of_a_run_folder(path):
    yaml = pytest.importorskip("yaml")
    from dino.d2.training.optimizer import tenth_for_backbone

    assert yaml.unsafe_load(f"!!python/name:{path} ''") is tenth_for_backbone


def test_pickles_name_old_modules():
    from dino.structures import Target

    text = pickle.dumps(Target, protocol=0).replace(b"dino.structures", b"dino.layers.structures")
    assert pickle.loads(text) is Target


def test_old_paths_come_first_too():
    """In a new process the old path is the first that is asked for; the new one must not be loaded again."""
    code = (
        "import importlib.util, dino.layers.structures as old, dino.files, dino.check.program as check\n"
        "import dino.structures, dino.utils.files, dino.data.check.check_dataset\n"
        "assert old is dino.structures and dino.files is dino.utils.files\n"
        "assert check is dino.data.check.check_dataset\n"
        "from dino.layers import structures, operator\n"
        "assert structures is old and operator.__name__ == 'dino.layers.ops.operator'\n"
        "from dino.layers import deform_attn\n"
        "assert callable(deform_attn)\n"
        # A folder stays a package. A module that kept its name in it is found by the old path as well, and not copied.
        "assert importlib.util.find_spec('dino.check').submodule_search_locations is not None\n"
        "assert importlib.util.find_spec('dino.files').submodule_search_locations is None\n"
        "import dino.check.splits as old, dino.data.check.splits as new\n"
        "assert old is new and dino.check is dino.data.check and dino.check.__name__ == 'dino.data.check'\n"
        "assert importlib.util.find_spec('dino.check.absent') is None\n"
    )
    run_python("-c", code)


def test_importing_the_package_finds_nothing_moved():
    code = "import sys, dino; print(sorted(name for name in sys.modules if name.startswith('dino')))"
    assert run_python("-c", code).strip() == "['dino', 'dino.utils', 'dino.utils.moved']"


def test_commands_by_their_old_names():
    """`run_module` does what `python -m` does; with another name than __main__, nothing is compiled."""
    code = "import runpy; print(runpy.run_module('dino.build', run_name='other')['_file_of']('cpu'))"
    assert run_python("-c", code).strip() == str(ROOT / "dino/layers/ops/_deform_attn_cpu.so")
    code = _Finder().find_spec("dino.env").loader.get_code("dino.env")
    assert code.co_filename == str(ROOT / "dino/cli/env.py")


def test_specs_describe_the_new_module():
    spec = importlib.util.find_spec("dino.files")
    assert spec.origin == str(ROOT / "dino/utils/files.py")
    assert importlib.util.find_spec("dino.absent") is None
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'dino\.absent'"):
        importlib.import_module("dino.absent")


def test_reloading_an_old_path_reloads_the_module():
    code = (
        "import importlib, dino.files as old, dino.utils.files as new\n"
        "old.__dict__.pop('counted')\n"
        "assert importlib.reload(old) is new and new.counted(1, 'box') == '1 box'\n"
        "assert importlib.import_module('dino.files') is new\n"
    )
    run_python("-c", code)


def test_walking_the_package_meets_no_module_twice():
    names = [module.name for module in pkgutil.walk_packages(dino.__path__, "dino.") if "d2" not in module.name]
    assert not set(names) & set(_MOVED)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["check." + n for n in ("annotations", "issues", "repair", "splits")])
def test_names_that_stayed_in_a_moved_package(name):
    assert importlib.import_module(f"dino.{name}") is importlib.import_module(f"dino.data.{name}")


@pytest.mark.parametrize("name", ["charts", "page", "results"])
def test_names_that_stayed_in_the_report(name):
    new = importlib.import_module(f"dino.evaluation.report.{name}")
    assert importlib.import_module(f"dino.report.{name}") is new


def test_old_submodules_come_from_their_package():
    from dino.check import faults, program
    from dino.report import build

    assert program.__name__ == "dino.data.check.check_dataset"
    assert faults.__name__ == "dino.data.check.issues"
    assert build.__name__ == "dino.evaluation.report.report"

"""Old paths of modules that have moved, for checkpoints, saved recipes and people's programs.

`import dino.d2.data` gives the module `dino.d2.data_loading` itself, not a copy. A renamed class keeps its old name as
an alias in its module. To move a module, change or add its line in `_MOVED`: no value may be a key. A module of a moved
package needs no line if its own name is still the same.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import CodeType, ModuleType

_MOVED = {
    "dino.analysis": "dino.modeling.network_cost",
    "dino.build": "dino.layers.ops.build",
    "dino.check": "dino.data.check",
    "dino.check.faults": "dino.data.check.issues",
    "dino.check.pictures": "dino.data.check.image_files",
    "dino.check.program": "dino.data.check.check_dataset",
    "dino.check.sheet": "dino.evaluation.report.preview",
    "dino.check.sizes": "dino.data.check.object_sizes",
    "dino.coco": "dino.data.coco",
    "dino.d2.backbones": "dino.d2.detectron2_backbones",
    "dino.d2.data": "dino.d2.data_loading",
    "dino.d2.describe": "dino.d2.recipe_description",
    "dino.d2.detector": "dino.d2.meta_arch",
    "dino.d2.ema": "dino.training.ema",
    "dino.d2.engine": "dino.d2.training.engine",
    "dino.d2.evaluation": "dino.d2.training.evaluation_hook",
    "dino.d2.guard": "dino.training.non_finite",
    "dino.d2.hooks": "dino.d2.training.hooks",
    "dino.d2.inference": "dino.d2.evaluate_checkpoint",
    "dino.d2.memory": "dino.training.memory_saving",
    "dino.d2.optim": "dino.d2.training.optimizer",
    "dino.d2.parallel": "dino.d2.training.parallel",
    "dino.d2.pictures": "dino.d2.training.batch_pictures",
    "dino.d2.predictor": "dino.d2.instances_predictor",
    "dino.d2.program": "dino.d2.training.launch",
    "dino.d2.sampler": "dino.d2.training.sampler",
    "dino.d2.speed": "dino.training.gpu_speed",
    "dino.d2.summary": "dino.d2.training.run_summary",
    "dino.d2.tiles": "dino.d2.tiled_detector",
    "dino.d2.trainer": "dino.d2.training.trainer",
    "dino.d2.training.ema": "dino.training.ema",
    "dino.d2.training.gpu_speed": "dino.training.gpu_speed",
    "dino.d2.training.memory_saving": "dino.training.memory_saving",
    "dino.d2.training.non_finite": "dino.training.non_finite",
    "dino.d2.tta": "dino.d2.augmented_detector",
    "dino.d2.writers": "dino.d2.training.writers",
    "dino.drawing": "dino.inference.drawing",
    "dino.env": "dino.cli.env",
    "dino.explain.pictures": "dino.explain.scenes",
    "dino.explain.program": "dino.explain.explain_batch",
    "dino.export.formats": "dino.export.export_formats",
    "dino.export.graph": "dino.export.export_wrapper",
    "dino.export.program": "dino.export.export_checkpoint",
    "dino.files": "dino.utils.files",
    "dino.images": "dino.data.images",
    "dino.layers.operator": "dino.layers.ops.operator",
    "dino.layers.reweighting": "dino.layers.loss_scaling",
    "dino.layers.self_test": "dino.layers.ops.self_test",
    "dino.layers.structures": "dino.structures",
    "dino.layers.transfer": "dino.utils.device",
    "dino.memory": "dino.inference.cpu",
    "dino.modeling.build": "dino.modeling.assembly",
    "dino.modeling.folding": "dino.inference.cpu",
    "dino.modeling.network": "dino.modeling.dino",
    "dino.modeling.onednn": "dino.inference.cpu",
    "dino.pickles": "dino.weights.pickles",
    "dino.predict": "dino.inference.predict_files",
    "dino.predictor": "dino.inference.predictor",
    "dino.rebuild": "dino.weights.description",
    "dino.recipes": "dino.utils.recipes",
    "dino.report": "dino.evaluation.report",
    "dino.report.analysis": "dino.evaluation.report.error_analysis",
    "dino.report.build": "dino.evaluation.report.report",
    "dino.report.program": "dino.evaluation.report.evaluate",
    "dino.tiling": "dino.inference.tiling",
    "dino.video": "dino.inference.video",
    "dino.weights.forms": "dino.weights.checkpoint_formats",
    "dino.weights.program": "dino.weights.conversion",
    "dino.weights.report": "dino.weights.load_report",
    "dino.weights.structure": "dino.weights.inferred_description",
}


def _within_moved_packages() -> dict[str, str]:
    """What `from dino.check import program` asks for: a renamed module by its old name in the package of today."""
    parts = {name: name.rpartition(".") for name in _MOVED}
    return {f"{_MOVED[package]}.{last}": _MOVED[n] for n, (package, _, last) in parts.items() if package in _MOVED}


_MOVED |= _within_moved_packages()


def current_name(name: str) -> str:
    """The path of a module today: of one that has moved, or that lies in a package that has; else `name`."""
    parent, _, last = name.rpartition(".")
    if name in _MOVED or not parent:
        return _MOVED.get(name, name)
    return f"{current_name(parent)}.{last}"


class _Loader(Loader):
    """Gives the module `target` to whoever imports it by an old path."""

    def __init__(self, target: str):
        self.target = target

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.target)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec  # the import system has replaced it by the spec of the old path

    def get_code(self, name: str) -> CodeType | None:
        """The code that `python -m` runs for an old path."""
        return find_spec(self.target).loader.get_code(self.target)

    def is_package(self, name: str) -> bool:
        """Whether the module has submodules."""
        return find_spec(self.target).submodule_search_locations is not None


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None):
        target = current_name(name) if name.startswith("dino.") else name
        found = find_spec(target) if target != name else None
        if found is None:
            return None
        spec = spec_from_loader(name, _Loader(target), origin=found.origin)
        spec.has_location = True
        return spec


def install() -> None:
    """Let imports by old paths find the moved modules. Repeated calls change nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before the finder that reads folders, which would load a copy

"""Read a recipe without Detectron2: what it imports from `detectron2` and `dino.d2` becomes dotted paths.

`dino.training.recipe_parts` finds this package's own parts for these paths. Where Detectron2 is installed, a recipe is
read in the same way, and a `config.yaml` that a run wrote is one too.
"""

from __future__ import annotations

import builtins
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from dino.utils.files import UserError, write_whole
from dino.utils.moved import current_name
from dino.utils.recipes import find_recipe

from . import parameter_groups
from .recipe_lengths import leave_open
from .recipe_nodes import LazyCall, add_branch, full_name

STOOD_IN = ("detectron2", "dino.d2")  # packages that are never imported here
_OWN = {  # what a recipe calls, or passes as a function
    "detectron2.config.LazyCall": LazyCall,
    "detectron2.config.lazy.LazyCall": LazyCall,
    "dino.d2.recipe.add_branch": add_branch,
    **{
        f"dino.d2.training.optimizer.{name}": getattr(parameter_groups, name)
        for name in ("layerwise_params", "tenth_for_backbone", "tenth_for_backbone_and_offsets")
    },
}
_YAML = (".yaml", ".yml")
_PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
NEEDS_DETECTRON2 = (
    "which needs Detectron2 (pip install --no-build-isolation "
    "git+https://github.com/facebookresearch/detectron2.git, see README.md)"
)


class _Name:
    """Stands for a module, class or function that is not imported; its attributes are further names."""

    def __init__(self, path: str):
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(f"{self._path}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UserError(f"it calls {self._path}, {NEEDS_DETECTRON2}")

    def __mro_entries__(self, bases: tuple) -> tuple:
        raise UserError(f"it derives a class from {self._path}, {NEEDS_DETECTRON2}")

    def __repr__(self) -> str:
        return self._path


def _named(path: str) -> Any:
    """What a recipe gets for a dotted path of Detectron2 or `dino.d2`, also by the former name of a module."""
    module, _, last = path.rpartition(".")
    path = f"{current_name(module)}.{last}" if module.startswith("dino.") else path
    return _OWN.get(path) or _Name(path)


def read_recipe(name_or_path: str) -> DictConfig:
    """Read a recipe, or the `config.yaml` of a run, without Detectron2. Recipes are programs: run only those you trust.

    Args:
        name_or_path: the name of a recipe of this package, or a file.

    Returns:
        the recipe, with dotted paths in place of what Detectron2 and `dino.d2` define.

    Raises:
        UserError: there is no such recipe; it is broken or incomplete, or can't be read without Detectron2.
    """
    path = str(find_recipe(name_or_path))
    try:
        cfg = _read_yaml(path) if path.endswith(_YAML) else _select(_execute(path))
    except Exception as error:  # a program can raise anything
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"the recipe {path} can't be read: {_line_of(error)}{kind}{error}") from error
    check_recipe(cfg, path)
    leave_open(cfg)
    _use_text(cfg)
    return cfg


def _line_of(error: Exception) -> str:
    """The line of a recipe that raised an error, for a message; "" where none of its lines did."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
    return f"line {lines[-1]}: " if lines else ""


def check_recipe(cfg: DictConfig, path: str) -> None:
    """Raise a UserError if a recipe lacks one of its five parts."""
    missing = [key for key in _PARTS if key not in cfg]
    if missing:
        raise UserError(f"{path} is no recipe: it does not define {', '.join(missing)}")


def save_recipe(cfg: DictConfig, path: str | Path) -> None:
    """Write a recipe as YAML, which `read_recipe` and Detectron2's LazyConfig read.

    Raises:
        UserError: the disk is full, or the folder can't be written.
    """
    content = _nameable(OmegaConf.to_container(cfg, resolve=False))
    text = yaml.dump(content, default_flow_style=None, allow_unicode=True, width=9999)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _nameable(node: Any, key: str = "") -> Any:
    """A container whose targets are dotted paths."""
    if isinstance(node, Mapping):
        return {name: _nameable(value, name) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_nameable(value) for value in node]
    return full_name(node) if key == "_target_" and not isinstance(node, str) else node


def _read_yaml(path: str) -> DictConfig:
    content = yaml.load(Path(path).read_bytes(), _Loader)
    if not isinstance(content, dict):
        raise UserError("it holds no settings")
    return DictConfig(content, flags={"allow_objects": True})


class _Loader(yaml.SafeLoader):
    """Reads plain YAML, tuples, and functions and classes by their dotted path."""


def _find_name(loader: yaml.Loader, path: str, node: yaml.Node) -> Any:
    """What `!!python/name:` names."""
    if path.startswith(tuple(f"{package}." for package in STOOD_IN)):
        return _named(path)
    module, _, attribute = path.rpartition(".")
    return getattr(builtins.__import__(module, fromlist=[attribute]), attribute)


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", _find_name)
_Loader.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node))


def _execute(path: str) -> dict[str, Any]:
    """Run the file of a recipe -> its names and their values."""
    namespace: dict[str, Any] = {"__file__": path, "__name__": "recipe", "__package__": "recipe"}
    namespace["__builtins__"] = {**vars(builtins), "__import__": _import}
    exec(compile(Path(path).read_bytes(), path, "exec"), namespace)
    return {name: _as_config(value) for name, value in namespace.items() if not name.startswith("__")}


def _import(name: str, globals: Mapping | None = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """`__import__` for the file of a recipe: stand-ins for Detectron2, other recipes by relative imports."""
    if level:
        return _import_recipe(name, Path(globals["__file__"]), fromlist or (), level)
    if name in STOOD_IN or name.startswith(tuple(f"{package}." for package in STOOD_IN)):
        return _Name(current_name(name) if fromlist else name.split(".")[0])
    return builtins.__import__(name, globals, locals, fromlist, level)


def _import_recipe(name: str, origin: Path, fromlist: tuple, level: int) -> ModuleType:
    """The module of `from .name import …` in the recipe `origin`; each import runs the file anew."""
    folder = Path(os.path.abspath(origin), *[".."] * level).resolve()
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    if not name or not path.is_file():
        raise UserError(f"it imports {'.' * level}{name}, but there is no file {path}")
    module = ModuleType(name)
    vars(module).update(_execute(str(path)))
    return module


def _as_config(value: Any) -> Any:
    return DictConfig(value, flags={"allow_objects": True}) if isinstance(value, dict) else value


def _select(namespace: Mapping[str, Any]) -> DictConfig:
    """The settings among the names of a recipe."""
    chosen = {k: v for k, v in namespace.items() if isinstance(v, DictConfig | ListConfig) and not k.startswith("_")}
    return DictConfig(chosen, flags={"allow_objects": True})


def _use_text(node: Any) -> None:
    """Replace stand-ins by their dotted paths, in place."""
    if not OmegaConf.is_config(node):
        return
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if isinstance(value, _Name):
            node[key] = repr(value)
        _use_text(value)

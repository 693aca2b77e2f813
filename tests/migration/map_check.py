"""What is wrong with a map of names: one check for every program's file."""

import functools
import importlib
import inspect
import pkgutil

from omegaconf import ListConfig, OmegaConf

from dino import cli
from dino.training.recipe_nodes import full_name
from dino.training.recipe_parts import find_part
from dino.training.recipe_reading import read_recipe
from dino.utils.overrides import has_key

ABSENT = object()
read = functools.cache(read_recipe)


def faults(name_map, keys):
    """Lines of text, none for a good map.

    Args:
        keys: of the program -> its default there, `ABSENT` for one that is required.
    """
    cfg = read(name_map.recipe)
    for key in sorted(set(keys) - set(name_map.settings)):
        yield f"{key} is not in the map"
    for key, setting in name_map.settings.items():
        if key not in keys:
            yield f"{key} is no key of {name_map.name}"
        elif keys[key] is ABSENT and "default" in setting.stated:
            yield f"{key} has no default there, so it needs none here"
        elif keys[key] is not ABSENT and ("default" not in setting.stated or not same(keys[key], setting.default)):
            yield f"{key} has the default {keys[key]!r} there, not {setting.default!r}"
        yield from (f"{key}: {fault}" for fault in faults_of(setting, cfg))


def faults_of(setting, cfg):
    """Of one setting: what it names here, and the values."""
    for name in setting.ours:
        fault = fault_of_name(name, cfg)
        if fault:
            yield fault
    for value in setting.values:
        for override in value.set:
            key = override.partition("=")[0]
            if value_of(key, cfg) is ABSENT and not key.startswith("model.network.neck.backbone."):
                yield f"no key {key} in the recipe"
    yield from faults_of_defaults(setting, cfg)


def faults_of_defaults(setting, cfg):
    """Where a stated default is not the recipe's value."""
    keys = setting.keys()
    expected = setting.ours_default if "ours_default" in setting.stated else setting.default
    several = "ours_default" in setting.stated and len(keys) > 1
    for index, key in enumerate(keys):
        wanted = expected[index] if several else expected
        found = value_of(key, cfg)
        if found is not ABSENT and not same(found, wanted):
            yield f"{key} is {found!r} in the recipe, not {wanted!r}"
    if "ours_default" in setting.stated and not keys:
        yield "ours_default without a key of the recipe"
    if {"default", "ours_default"} <= setting.stated and not several and same(setting.default, expected):
        yield "ours_default is equal to default: leave it out"


def fault_of_name(name, cfg):
    """What is wrong with one name of ours; None for a good one."""
    if " " in name:
        return fault_of_flag(name)
    if name.startswith("dino."):
        return None if is_importable(name) else f"no class or function {name}"
    return None if value_of(name, cfg) is not ABSENT else f"no key {name} in the recipe"


def is_importable(path):
    """Whether a dotted path leads to a class or a function."""
    if path.startswith("dino.d2.") and not importlib.util.find_spec("detectron2"):
        return True
    try:
        return callable(pkgutil.resolve_name(path))
    except (AttributeError, ImportError):
        return False


def fault_of_flag(name):
    """Of `dino VERB --flag` or `dino VERB ARGUMENT`, with a verb of `dino data` too."""
    program, verb, *words = name.split()
    if program != "dino" or verb not in cli.VERBS:
        return f"no verb {verb} in {name!r}"
    parser = parser_of(verb)
    for action in parser._actions:
        if not words[1:] and isinstance(action.choices, dict) and words[0] in action.choices:
            return None
        if len(words) > 1 and isinstance(action.choices, dict) and words[0] in action.choices:
            parser, words = action.choices[words[0]], words[1:]
    flags = {flag for action in parser._actions for flag in action.option_strings}
    named = " ".join(f"{action.metavar} {action.dest}" for action in parser._actions if not action.option_strings)
    if len(words) != 1 or (words[0] not in flags and words[0] not in named.replace("[", " ").split()):
        return f"no argument {' '.join(words)} of dino {verb}"
    return None


@functools.cache
def parser_of(verb):
    return importlib.import_module(f"dino.cli.{verb.replace('-', '_')}").build_parser()


def value_of(key, cfg):
    """The recipe's value; the default of a part's argument that the recipe leaves out; else `ABSENT`."""
    if has_key(cfg, key):
        return plain(OmegaConf.select(cfg, key))
    node, _, name = key.rpartition(".")
    part = OmegaConf.select(cfg, node) if node else None
    if not OmegaConf.is_dict(part) or "_target_" not in part:
        return ABSENT
    target = part["_target_"]
    try:
        found = inspect.signature(find_part(target) if isinstance(target, str) else target).parameters.get(name)
    except (TypeError, ValueError):
        return ABSENT
    return ABSENT if found is None or found.default is inspect.Parameter.empty else plain(found.default)


def plain(value):
    """A value of a recipe as TOML has it."""
    if isinstance(value, ListConfig | list | tuple):
        return [plain(item) for item in value]
    return full_name(value) if callable(value) else value


def same(one, other):
    """Equal, where True is not 1."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or (isinstance(one, bool) == isinstance(other, bool) and one == other)

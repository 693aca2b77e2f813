"""The maps of names: settings of other DINO programs, and what this project calls them. Their form: official.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dino.utils.files import DataError

_FOLDER = Path(__file__).parent
PROGRAMS = ("official", "detrex", "mmdetection", "transformers")
_KINDS = ("ours", "left_out", "missing", "never_read")  # a setting has one of them
_VALUE_KINDS = ("set", "left_out", "missing")


class Value(NamedTuple):
    """What one value of a setting becomes.

    Args:
        theirs: the value there.
        set: overrides of our recipe, key=value.
        left_out, missing: as those of `Setting`, of this value.
    """

    theirs: Any
    set: tuple[str, ...] = ()
    left_out: str = ""
    missing: str = ""


class Setting(NamedTuple):
    """A setting of another program. The form and the meaning of each field stand in official.toml."""

    key: str
    group: str
    default: Any = None
    ours: tuple[str, ...] = ()
    left_out: str = ""
    missing: str = ""
    never_read: bool = False
    ours_default: Any = None
    why: str = ""
    values: tuple[Value, ...] = ()
    convert: str = "copy"
    read: str = ""
    note: str = ""
    stated: frozenset[str] = frozenset()  # the fields that the file has

    def keys(self) -> tuple[str, ...]:
        """Keys of our recipe among `ours`."""
        return tuple(name for name in self.ours if " " not in name and not name.startswith("dino."))


class NameMap(NamedTuple):
    """All settings of a program.

    Args:
        name, address: of the program. recipe: the name of ours whose values are compared.
        groups: name -> heading. settings: by their key.
    """

    name: str
    address: str
    recipe: str
    groups: dict[str, str]
    settings: dict[str, Setting]


def read_map(program: str, text: str | None = None) -> NameMap:
    """Read the map of a program.

    Args:
        program: one of `PROGRAMS`.
        text: of another file in place of the program's.

    Raises:
        DataError: the file breaks the form.
    """
    path = _FOLDER / f"{program}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8") if text is None else text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path.name} is no TOML: {error}") from None
    head, groups = content.pop("program", {}), content.pop("groups", {})
    if set(content) - set(groups):
        raise DataError(f"{path.name}: no heading in [groups] for {', '.join(sorted(set(content) - set(groups)))}")
    settings: dict[str, Setting] = {}
    for group, entries in content.items():
        for key, entry in entries.items():
            if key in settings:
                raise DataError(f"{path.name}: {key} stands in two groups")
            settings[key] = _setting(f"{path.name}: {key}", key, group, entry)
    return NameMap(head["name"], head["address"], head["recipe"], groups, settings)


def _setting(where: str, key: str, group: str, entry: Mapping[str, Any]) -> Setting:
    """An entry of a file, checked.

    Raises:
        DataError: it breaks the form.
    """
    unknown = set(entry) - set(Setting._fields[2:-1])
    kinds = [kind for kind in _KINDS if kind in entry]
    if unknown:
        raise DataError(f"{where}: unknown field {', '.join(sorted(unknown))}")
    if len(kinds) != 1:
        raise DataError(f"{where}: needs one of {', '.join(_KINDS)}, not {' and '.join(kinds) or 'none'}")
    fields = {name: _none(value) for name, value in entry.items()}
    if "ours" in fields:
        fields["ours"] = (fields["ours"],) if isinstance(fields["ours"], str) else tuple(fields["ours"])
    fields["values"] = tuple(_value(where, value) for value in entry.get("values", ()))
    return Setting(key=key, group=group, **fields, stated=frozenset(entry))


def _value(where: str, entry: Mapping[str, Any]) -> Value:
    """An item of `values`, checked."""
    kinds = [kind for kind in _VALUE_KINDS if kind in entry]
    if len(kinds) != 1 or set(entry) != {"theirs", kinds[0]}:
        raise DataError(f"{where}: an item of values needs theirs and one of {', '.join(_VALUE_KINDS)}")
    fields = {name: _none(value) for name, value in entry.items()}
    return Value(**fields | {"set": tuple(fields.get("set", ()))})


def _none(value: Any) -> Any:
    """A value of TOML, which has no None."""
    if isinstance(value, list):
        return [_none(item) for item in value]
    return None if value == "None" else value

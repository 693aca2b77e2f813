"""From other DINO programs to this one: what their settings are called here, and their configuration files."""

from .name_map import PROGRAMS, NameMap, Setting, Value, read_map

__all__ = ["PROGRAMS", "NameMap", "Setting", "Value", "read_map"]

"""The parser of every verb: arguments in any order, and each mistake in one line with the nearest right form."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

SCORE_THRESH = 0.4  # of dino.structures, which imports torch
_NUMBERS = {"int": "a whole number", "float": "a number"}  # types as argparse names them
_KEYS = re.compile(r"--?([A-Za-z_][\w.-]*)")


def _is_flag(word: str) -> bool:
    return word.startswith("-")


class Parser(argparse.ArgumentParser):
    """Like its base, except that flags may stand between positional arguments, and that errors are one line.

    Args:
        setting_of: name and value of a flag that the verb lacks -> the override that is meant, or "".
    """

    def __init__(self, *args: Any, setting_of: Callable[[str, str], str] = lambda name, value: "", **options: Any):
        self.positionals: list[argparse.Action] = []
        self.setting_of = setting_of
        super().__init__(*args, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As the base's; remembers those without a flag."""
        action = super().add_argument(*names, **options)
        self.positionals += [] if action.option_strings else [action]
        return action

    def add_subparsers(self, **options: Any) -> argparse._SubParsersAction:
        """As the base's; remembers it."""
        action = super().add_subparsers(**options)
        self.positionals.append(action)
        return action

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """The arguments; exits with code 2 after a mistake."""
        words = list(sys.argv[1:] if args is None else args)
        if words == ["help"]:
            words = ["--help"]
        known, unknown = self._parse_known(words, namespace)
        if unknown:
            self.error(self._describe_unknown(unknown, words))
        return known

    def _parse_known(self, words: list[str], namespace: Any) -> tuple[argparse.Namespace, list[str]]:
        """With flags between the positional arguments; a parser of sub-verbs can't have that."""
        verbs = any(isinstance(action, argparse._SubParsersAction) for action in self.positionals)
        parse = self.parse_known_args if verbs else self.parse_known_intermixed_args
        return parse(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        print(f"error: {self._reword(message)}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)

    def _reword(self, message: str) -> str:
        """A message of argparse -> what to do."""
        for pattern, rewrite in _MESSAGES.items():
            found = re.fullmatch(pattern, message, re.S)
            if found:
                return rewrite(self, *found.groups())
        return message

    def _describe_unknown(self, unknown: Sequence[str], words: Sequence[str]) -> str:
        """The first argument that the verb lacks, and what may be meant."""
        word = ([*filter(_is_flag, unknown)] or unknown)[0]
        if not _is_flag(word):
            return f"{word!r} is one argument too many"
        flag, _, value = word.partition("=")
        near = nearest(flag.lower().replace("_", "-").strip("-"), self._names_of_flags())
        following = [*words, "-"][words.index(word) + 1]
        name = _KEYS.match(flag)
        setting = self.setting_of(name[1], value or ("" if _is_flag(following) else following)) if name else ""
        if setting and (not near or "." in flag):
            return f"no argument {flag}: write {setting}"
        return f"no argument {flag}" + (f"; the nearest is --{near}" if near else "")

    def _names_of_flags(self) -> list[str]:
        """The flags that the help shows, without their dashes."""
        flags = self._option_string_actions.items()
        return [flag[2:] for flag, a in flags if a.help != argparse.SUPPRESS and flag.startswith("--")]

    def _find_action(self, name: str) -> argparse.Action | None:
        """An argument by the name that argparse gives it in its messages."""
        actions = [*self.positionals, *self._option_string_actions.values()]
        return next((action for action in actions if argparse._get_action_name(action) == name), None)

    def _describe_number(self, name: str, *_: str) -> str:
        """An argument with too few or too many values."""
        action = self._find_action(name)
        metavar = action.metavar if action else None
        takes = " ".join(metavar) if isinstance(metavar, tuple) else metavar or (action.dest if action else "")
        return f"{name} takes {takes.upper() if isinstance(metavar, str) or not metavar else takes}"

    def _describe_choice(self, name: str, value: str) -> str:
        action = self._find_action(name)
        if isinstance(action, argparse._SubParsersAction):
            name = self.prog
        choices = [str(choice) for choice in action.choices] if action and action.choices else []
        near = nearest(value.lower(), choices)
        hint = f"; the nearest is {near}" if near else ""
        return f"{name} has no {value!r}{hint}: there are {', '.join(choices)}"


def _describe_missing(parser: Parser, names: str) -> str:
    form = " ".join(_form_of(action) for action in parser.positionals)
    return f"missing: {names} ({parser.prog} {form})"


def _form_of(action: argparse.Action) -> str:
    """A positional argument in a line of usage."""
    return f"{action.metavar or action.dest}{'...' if action.nargs in ('+', '*') else ''}"


_MESSAGES: dict[str, Callable[..., str]] = {  # of argparse, and what is said instead
    r"argument ([^:]+): expected .* arguments?": Parser._describe_number,
    r"argument ([^:]+): invalid choice: '(.*)' \(choose from .*\)": Parser._describe_choice,
    r"argument ([^:]+): invalid (int|float) value: (.*)": lambda parser, name, kind, value: (
        f"{name} must be {_NUMBERS[kind]}, not {value}"
    ),
    r"argument ([^:]+): ignored explicit argument (.*)": lambda parser, name, value: (
        f"{name} takes no value, not {value}"
    ),
    r"the following arguments are required: (.*)": _describe_missing,
}


def nearest(word: str, known: Sequence[str]) -> str:
    """The most similar of some names, or "" if none is similar."""
    folded = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word, folded, 1, 0.6)
    return folded[found[0]] if found else ""


def new_parser(prog: str, description: str, examples: str, **options: Any) -> Parser:
    """A parser without arguments, whose `--help` keeps the line breaks of both texts.

    Args:
        options: of `Parser`; `usage` is the first line of the help, without the program.
    """
    if "usage" in options:
        options["usage"] = f"{prog} {options['usage']}"
    formatter = argparse.RawDescriptionHelpFormatter
    return Parser(prog, description=description, epilog=examples, formatter_class=formatter, **options)


def check_arguments(parser: argparse.ArgumentParser, problems: Mapping[str, object]) -> None:
    """Exit with the first message of `problems` whose condition holds."""
    for message, holds in problems.items():
        if holds:
            parser.error(message)

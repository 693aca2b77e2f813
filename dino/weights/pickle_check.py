"""Checking a pickle before it is read: the classes it names, and the size and depth of what it would make.

A pickle is a program for a stack machine. Here each instruction runs on sizes alone: an item of the stack is the number
of values that it holds, each counted as often as it is mentioned, and its depth. So no object of the file is made.
"""

from __future__ import annotations

import io
import os
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Container
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dino.utils.files import DataError

_MAX_STEPS = 500_000  # instructions of a file; a full-size model with two averages and an optimizer has about 60,000
_MAX_VALUES = 10_000_000  # of one object; 2**40 with 40 nested tuples of two equal items
_MAX_DEPTH = 200  # Python hashes nested tuples by recursion, and crashes at some ten thousands
_MAX_BITS = 8192  # of a whole number
_ENCODINGS = ("latin1", "latin-1")  # of bytes as text; others, applied again and again, multiply the length
# Callables of PyTorch for tensors that no network here has, by the end of their names.
_ODD_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without numbers (of the meta device)",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of a class without numbers of its own",
}


class BoundedFile(io.BufferedReader):
    """A file that is read in parts of bounded length, however long a part claims to be.

    Args:
        path: of the file.
        most: bytes of a part.
    """

    def __init__(self, path: str | Path, most: int):
        super().__init__(io.FileIO(path))
        self.most = most

    def read(self, size: int | None = -1) -> bytes:
        """Read `size` bytes, or all that is left.

        Raises:
            DataError: that is too much.
        """
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > self.most:
            raise DataError(f"the file has a part of {size:,} bytes, where at most {self.most:,} were expected")
        return super().read(max(size, 0))

    def readline(self, size: int | None = -1) -> bytes:
        """Read a line, or its first `most` bytes."""
        return super().readline(self.most)


class _Item(NamedTuple):
    """What is known of an item of the stack."""

    size: int = 1
    depth: int = 1
    text: str = ""  # a string, the full name of a class or function, or the second text of a pair


_LEAF, _MARK = _Item(), _Item(0, 0, "mark")
_IN_PLACE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # change the item below
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_REFUSED = ("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")
_TO_MARK = pickletools.markobject


class PickleCheck:
    """Checks pickles of one file, which share the bound on instructions.

    Args:
        allowed: full names of the classes and functions that a pickle may contain.
    """

    def __init__(self, allowed: Container[str]):
        self.allowed = allowed
        self.steps = 0

    def run(self, file: BinaryIO) -> None:
        """Check the pickle at the position of `file`, and leave the position after it.

        Raises:
            DataError: it names another class, or its size or depth is out of bounds.
            ValueError: it is cut short or no pickle.
        """
        self.stack: list[_Item] = []
        self.memo: dict[int, _Item] = {}
        self.last_text = ""
        for opcode, argument, _ in pickletools.genops(file):
            self.steps += 1
            if self.steps > _MAX_STEPS:
                raise DataError(f"the file has more than {_MAX_STEPS:,} pickled values")
            try:
                self._step(opcode, argument)
            except IndexError:
                raise ValueError("no pickle") from None

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Run one instruction."""
        name = opcode.name
        if name in _PUTS or name == "MEMOIZE":
            self._put(len(self.memo) if name == "MEMOIZE" else argument)
        elif name in _GETS:
            if argument not in self.memo:
                raise ValueError("no pickle")
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name in _REFUSED:
            raise DataError(f"the file has a pickle with {name}, which plain data do not need")
        elif opcode.stack_before:
            self._change(opcode, argument)
        elif opcode.stack_after:
            self.stack.append(self._leaf(name, argument))

    def _put(self, number: int) -> None:
        """Remember the top of the stack. A reader in C takes memory for all numbers up to the largest one."""
        if number > _MAX_STEPS:
            raise DataError(f"the file numbers a pickled value {number:,}")
        self.memo[number] = self.stack[-1]

    def _change(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Run an instruction that takes items from the stack and puts back what it makes of them."""
        taken = self._take(opcode)
        made = len(opcode.stack_after)
        if opcode.name == "DUP":
            self.stack += [*taken, *taken]
        elif made:
            self.stack.append(_combine(taken, self._text(opcode.name, argument, taken), opcode.name in _IN_PLACE))

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[_Item]:
        """Take what an instruction needs from the stack, in order and without a mark."""
        before = opcode.stack_before
        if _TO_MARK not in before:
            split = len(self.stack) - len(before)
            if split < 0:
                raise ValueError("no pickle")
            taken = self.stack[split:]
        else:
            mark = len(self.stack) - 1
            while self.stack[mark] is not _MARK:
                mark -= 1
            split = mark - before.index(_TO_MARK)
            taken = self.stack[max(split, 0) : mark] + self.stack[mark + 1 :]
        del self.stack[max(split, 0) :]
        return taken

    def _leaf(self, name: str, argument: Any) -> _Item:
        """The item that an instruction makes of its argument alone."""
        if name == "GLOBAL":
            return _Item(text=self._check_name(*_modern(*argument.split(" ", 1))))
        if isinstance(argument, str):
            self.last_text = argument[:100]
            return _Item(text=self.last_text)
        if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
            raise DataError(f"the file has a whole number of {argument.bit_length():,} bits")
        return _LEAF

    def _text(self, name: str, argument: Any, taken: list[_Item]) -> str:
        """The text of the item that an instruction makes of others."""
        if name == "INST":
            return self._check_name(*_modern(*argument.split(" ", 1)))
        if name == "STACK_GLOBAL":
            return self._check_name(taken[0].text, taken[1].text)
        if name == "REDUCE":
            _check_call(*(item.text for item in taken))
        return taken[1].text if name in ("TUPLE", "TUPLE2") and len(taken) == 2 else ""

    def _check_name(self, module: str, name: str) -> str:
        """Raise a DataError for a class or function that is not allowed; returns its full name."""
        full = f"{module}.{name}"
        if name in _ODD_TENSORS:
            raise DataError(f"{self.last_text!r} is {_ODD_TENSORS[name]}: save it as a dense one")
        if full not in self.allowed:
            raise DataError(f"the file contains {full[:100]}, which is not plain data")
        return full


def _combine(items: list[_Item], text: str, in_place: bool) -> _Item:
    """The item that holds `items`; `in_place` where the first one holds the others."""
    size = sum(item.size for item in items) + (not in_place)
    inner = max((item.depth for item in items[in_place:]), default=0)
    depth = max(items[0].depth, 1 + inner) if in_place else 1 + inner
    if size > _MAX_VALUES:
        raise DataError(f"the file has an object of more than {_MAX_VALUES:,} values")
    if depth > _MAX_DEPTH:
        raise DataError(f"the file nests values more than {_MAX_DEPTH} deep")
    return _Item(size, depth, text)


def _check_call(called: str, last_argument: str) -> None:
    """Raise a DataError where bytes have another encoding than latin1."""
    if called == "_codecs.encode" and last_argument not in _ENCODINGS:
        raise DataError(f"the file encodes bytes by {last_argument[:20]!r}: latin1 was expected")


def _modern(module: str, name: str) -> tuple[str, str]:
    """The names of Python 3 for those of Python 2, by which protocol 2 calls classes."""
    if (module, name) in NAME_MAPPING:
        return NAME_MAPPING[module, name]
    return IMPORT_MAPPING.get(module, module), name

"""Harmless stand-ins for the classes of other programs that weight files contain.

A file names a class; the reader puts one of these in its place. NumPy's arrays and numbers, ordered and default dicts
are read as data. All else on the list becomes `Skipped`, which holds nothing. No class of the file is ever imported.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dino.utils.files import DataError

_NUMBERS = re.compile(r"[biufc](1|2|4|8|16)|[SU]\d{1,5}")  # kinds of arrays; all others hold objects or records


class Skipped:
    """An object that a file contains and nobody needs. It holds nothing."""

    def __new__(cls, *args: Any, **options: Any) -> Skipped:
        """Take any arguments, and keep none."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


class _DType:
    """The type of an array, as NumPy pickles it: a name, then the byte order."""

    def __init__(self, name: str = "", *_: Any):
        if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
            raise DataError(f"the file has a NumPy array of {str(name)[:20]!r}: numbers or texts were expected")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        """Take the byte order from (version, byte order, …)."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def read(self, data: Any) -> np.ndarray:
        """Bytes -> a copy as an array (N,)."""
        data = data.encode("latin1") if isinstance(data, str) else data  # of Python 2
        return np.frombuffer(data, self.order.replace("|", "=") + self.name).copy()


class _Array(np.ndarray):
    """An array that can be filled by its own shape, type and bytes alone."""

    def __new__(cls, *_: Any) -> _Array:
        """An empty array, whatever the file asks for."""
        return super().__new__(cls, (0,), "b")

    def __setstate__(self, state: tuple) -> None:
        """Take (version, shape, type, whether in Fortran's order, bytes)."""
        _, shape, dtype, fortran, data = state
        numbers = dtype.read(data)
        _check_shape(shape, len(numbers))
        super().__setstate__((1, shape, numbers.dtype, fortran is True, numbers.tobytes()))


def _check_shape(shape: Any, count: int) -> None:
    """Raise a DataError for a shape that `count` numbers do not fill."""
    sides = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    if not sides or len(shape) > 32 or math.prod(shape) != count:
        raise DataError(f"the file has a NumPy array of shape {str(shape)[:50]} with {count} numbers")


def _from_buffer(data: Any, dtype: _DType, shape: Any, order: str = "C") -> np.ndarray:
    """NumPy's arrays in protocol 5."""
    numbers = dtype.read(data)
    _check_shape(shape, len(numbers))
    return numbers.reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _DType, data: Any = b"") -> Any:
    """NumPy's numbers."""
    numbers = dtype.read(data)
    _check_shape((1,), len(numbers))
    return numbers[0]


def _dict(*args: Any) -> collections.OrderedDict:
    """A dict, from those arguments of the class that are dicts. A default factory is dropped."""
    given = [arg for arg in args if isinstance(arg, dict)]
    return collections.OrderedDict(given[0] if given else ())


def _encode(text: Any, encoding: str = "") -> bytes:
    """Bytes in protocols before 3."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise DataError("the file has bytes that are not encoded by latin1")
    return text.encode("latin1")


def _get_attribute(owner: Any, name: Any, *_: Any) -> Skipped:
    """A method of a skipped class, which is skipped too. Nothing is looked up."""
    if not isinstance(owner, Skipped) and not (isinstance(owner, type) and issubclass(owner, Skipped)):
        raise DataError("the file contains builtins.getattr, which is not plain data")
    return Skipped()


def _refuse_state(*_: Any) -> None:
    raise DataError("the file changes a class, which plain data do not")


def _calls(function: Callable) -> type:
    """A class that calls `function` where an instance is asked for. No pickle can change its attributes."""
    make = {"__new__": lambda cls, *args: function(*args), "__setstate__": _refuse_state}
    return type(function.__name__, (), make)


def _names(lines: str) -> list[str]:
    """Full names from lines of a module and its members."""
    split = [line.split() for line in lines.strip().splitlines()]
    return [f"{module}.{name}" for module, *members in split for name in members]


_NUMPY = {
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    **{
        f"numpy.{core}.{name}": _calls(make)
        for core in ("core", "_core")
        for name, make in (
            ("multiarray._reconstruct", _Array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}
# Classes of settings that are dicts, read as such.
_DICTS = _names("""
collections OrderedDict defaultdict
addict.addict Dict
detectron2.config.config CfgNode
easydict EasyDict
fvcore.common.config CfgNode
lightning.fabric.utilities.data AttributeDict
lightning.pytorch.utilities.parsing AttributeDict
lightning_fabric.utilities.data AttributeDict
mmcv.utils.config ConfigDict
mmengine.config.config ConfigDict
munch Munch
pytorch_lightning.utilities.parsing AttributeDict
yacs.config CfgNode
""")
# Classes that hold settings, logs and states of trainers. Nothing is read of them.
_SKIPPED = _names("""
builtins bool dict float frozenset int list object str tuple
datetime date datetime time timedelta timezone
decimal Decimal
deepspeed.runtime.fp16.loss_scaler DynamicLossScaler LossScaler
deepspeed.runtime.zero.config ZeroStageEnum
deepspeed.utils.tensor_fragment fragment_address
fractions Fraction
mmcv.utils.config Config
mmengine.config.config Config
mmengine.config.lazy LazyAttr LazyObject
mmengine.logging.history_buffer HistoryBuffer
mmengine.runner.log_processor LogProcessor
ml_collections.config_dict.config_dict ConfigDict FieldReference FrozenConfigDict
omegaconf.base ContainerMetadata Metadata SCMode UnionNode
omegaconf.dictconfig DictConfig
omegaconf.listconfig ListConfig
omegaconf.nodes AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode InterpolationResultNode PathNode StringNode
pathlib Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath
pathlib._local Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath
pytorch_lightning.callbacks.early_stopping EarlyStopping
pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint
torch.optim.lr_scheduler CosineAnnealingLR LambdaLR MultiStepLR OneCycleLR StepLR
torch.torch_version TorchVersion
types SimpleNamespace
typing Any Dict List Optional Tuple Union
uuid UUID
""")
# Full name in a file -> the class in its place, in files of any kind.
STAND_INS: dict[str, type] = {
    **dict.fromkeys(_SKIPPED, Skipped),
    **dict.fromkeys(_DICTS, _calls(_dict)),
    "_codecs.encode": _calls(_encode),
    **_NUMPY,
}
# The same for PyTorch's files, where logs contain their methods, and queues end in lists.
PYTORCH_STAND_INS: dict[str, type] = {
    **STAND_INS,
    "builtins.getattr": _calls(_get_attribute),
    "collections.deque": _calls(lambda *_: []),
}
_DTYPES = [str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)]
# All that PyTorch's files may contain: these and what its reader has for dense tensors. Its other classes take memory.
PYTORCH_NAMES = frozenset([*PYTORCH_STAND_INS, *_DTYPES]).union(
    _names("""
torch DoubleStorage FloatStorage HalfStorage BFloat16Storage ComplexDoubleStorage ComplexFloatStorage
torch LongStorage IntStorage ShortStorage CharStorage ByteStorage BoolStorage
torch Size Tensor device
torch.storage TypedStorage UntypedStorage
torch._utils _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter _rebuild_parameter_with_state
torch._tensor _rebuild_from_type_v2
torch.nn.parameter Parameter
argparse Namespace
builtins complex set
collections Counter
""")
)

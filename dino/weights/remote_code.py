"""The file of a transformers folder that lets transformers load it, with `trust_remote_code=True`, on its own.

The file holds no model: it names the classes of the installed package, or says which package to install.
"""

import warnings
from pathlib import Path

from dino.utils.files import write_whole

_FILE = "dino_detr.py"
_TITLE = '"""DINO for transformers: the classes of the installed package dino-detectron2."""'
_CODE = f"""{_TITLE}

try:
    from dino.hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrModel
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "dino":
        raise
    raise ImportError('This model needs dino-detectron2: pip install "dino-detectron2[hf]"') from None
"""
_CLASSES = {
    "config.json": {
        "AutoConfig": "DinoDetrConfig",
        "AutoModel": "DinoDetrModel",
        "AutoModelForObjectDetection": "DinoDetrForObjectDetection",
    },
    "preprocessor_config.json": {"AutoImageProcessor": "DinoDetrImageProcessor"},
}
# File of a folder -> its field `auto_map`: the classes that transformers takes from the file of code.
AUTO_MAPS = {
    file: {auto: f"{_FILE.removesuffix('.py')}.{name}" for auto, name in names.items()}
    for file, names in _CLASSES.items()
}


def write_remote_code(folder: str | Path) -> None:
    """Write the file of code that `AUTO_MAPS` names. Another file of its name is kept, with a warning.

    Args:
        folder: with the `config.json`.

    Raises:
        UserError: the folder can't be written.
    """
    path = Path(folder) / _FILE
    if path.is_file() and not path.read_bytes().startswith(_TITLE.encode()):
        warnings.warn(
            f"{path} is no file of this project and stays as it is, but from_pretrained(…, trust_remote_code=True) "
            "runs it: move it away and save again",
            stacklevel=2,
        )
        return
    write_whole(path, lambda part: part.write_text(_CODE, encoding="utf-8"))

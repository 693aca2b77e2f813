"""The file of a transformers folder that lets transformers load it, with `trust_remote_code=True`, on its own.

The file holds no model: it names the classes of the installed package, or says which package to install.
"""

from pathlib import Path

from dino.utils.files import write_whole

_FILE = "dino_detr.py"
_CODE = '''"""DINO for transformers: the classes of the installed package dino-detectron2."""

try:
    from dino.hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrModel
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "dino":
        raise
    raise ImportError('This model needs dino-detectron2: pip install "dino-detectron2[hf]"') from None
'''
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
    """Write the file of code that `AUTO_MAPS` names.

    Args:
        folder: with the `config.json`.

    Raises:
        UserError: the folder can't be written.
    """
    write_whole(Path(folder) / _FILE, lambda path: path.write_text(_CODE, encoding="utf-8"))

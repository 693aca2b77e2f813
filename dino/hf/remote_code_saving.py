"""What a config and an image processor save so that their folder is loaded without `import dino.hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dino.weights.remote_code import AUTO_MAPS, write_remote_code


class SavesRemoteCode:
    """A mix-in, before the class of transformers: saves `auto_map`, and beside it the file of code that it names.

    Transformers would copy the file of this class instead, without the package around it.
    """

    _saved_as: str  # name of the JSON file in a folder

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: transformers calls this for classes whose file is to be copied into each folder."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `auto_map`; what a hub wrote into `auto_map` is not kept."""
        return super().to_dict() | {"auto_map": dict(AUTO_MAPS[self._saved_as])}

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """Write the JSON file; in a folder, the file of code beside it."""
        super().to_json_file(json_file_path, *args, **kwargs)
        if Path(json_file_path).name == self._saved_as:
            write_remote_code(Path(json_file_path).parent)

"""The official program's configuration files, written from their keys and values."""

import json
from pathlib import Path

KEYS = json.loads(Path(__file__).with_name("official_keys.json").read_text())
_FOLDER = "config/DINO"
_MAIN = f"{_FOLDER}/DINO_4scale.py"
SCRIPT = ["dn_scalar=100", "embed_init_tgt=TRUE", "dn_label_coef=1.0", "dn_bbox_coef=1.0", "use_ema=False"]
SCRIPT += ["dn_box_noise_scale=1.0"]  # options of the scripts of the published runs


def write_official(folder):
    """Write config/DINO/*.py; the other three files hold what DINO_4scale.py holds, but for the keys that differ."""
    for name, own in KEYS.items():
        if name.startswith(_FOLDER):
            values = own if name == _MAIN or "transformer" in name else {**KEYS[_MAIN], **own}
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    return folder / _FOLDER

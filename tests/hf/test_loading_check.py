"""A hostile config.json: one error, in little time and memory."""

import json
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForObjectDetection

from dino.hf import DinoDetrForObjectDetection

from .tiny_model import NAMES, tiny_model

HOSTILE = {
    "width": {"d_model": 999_968},
    "layers": {"encoder_layers": 1000, "decoder_layers": 1000},
    "hidden": {"encoder_ffn_dim": 1_000_000, "decoder_ffn_dim": 1_000_000},
    "queries": {"num_queries": 1_000_000, "d_model": 320},
    "points": {"encoder_n_points": 1000, "decoder_n_points": 1000, "d_model": 320},
    "backbone": {"backbone": "vit_giant_patch14_dinov2"},
    "options": {"backbone": "convnext_tiny", "backbone_kwargs": {"dims": [10_000] * 4}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["strict", "resizing"])
def test_a_network_far_beyond_its_file_is_refused_at_once(folder, tmp_path, fields, options):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    start = time.process_time()
    with pytest.raises(ValueError, match=r"can't build the network of this config: .*than the file has"):
        AutoModelForObjectDetection.from_pretrained(tmp_path, **options)
    assert time.process_time() - start < 5  # half a second on an idle machine; minutes without the check


def test_new_labels_may_outgrow_the_file(folder):
    names = {"id2label": {label: f"class {label}" for label in range(20_000)}, "label2id": {}}
    model = DinoDetrForObjectDetection.from_pretrained(folder, ignore_mismatched_sizes=True, **names)
    assert model.config.num_labels == 20_000


def test_files_without_a_list_of_tensors_are_measured(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DinoDetrForObjectDetection.from_pretrained(tmp_path).config.num_labels == len(NAMES)
    (tmp_path / "config.json").write_text(json.dumps({**config, **HOSTILE["hidden"]}))
    with pytest.raises(ValueError, match="than the file has"):
        DinoDetrForObjectDetection.from_pretrained(tmp_path)


def test_a_cut_file_is_one_error(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"can't read the weights .*model.safetensors"):
        DinoDetrForObjectDetection.from_pretrained(tmp_path)


def test_a_name_on_the_hub_is_found_in_its_cache(folder, tmp_path, monkeypatch):
    """The files of a repository lie in the cache when the network is built."""
    snapshot = tmp_path / "models--someone--dino" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    options = {"cache_dir": tmp_path, "local_files_only": True}
    (snapshot / "config.json").write_text(json.dumps(config))
    assert DinoDetrForObjectDetection.from_pretrained("someone/dino", **options).config.num_labels == len(NAMES)
    (snapshot / "config.json").write_text(json.dumps({**config, **HOSTILE["hidden"]}))
    with pytest.raises(ValueError, match="than the file has"):
        DinoDetrForObjectDetection.from_pretrained("someone/dino", **options)


def test_weights_that_are_given_need_no_file(tmp_path):
    model = tiny_model()
    loaded = DinoDetrForObjectDetection.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(loaded.model.network.level_embed, model.model.network.level_embed)


def test_unrelated_files_are_not_read(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    DinoDetrForObjectDetection.from_pretrained(tmp_path)

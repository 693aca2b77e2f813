"""What all models of transformers have in common, and what those have that live outside of it."""

import inspect
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")

import huggingface_hub
from transformers import AutoModelForObjectDetection

from dino.hf import DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrModel
from dino.weights.remote_code import write_remote_code
from tests.hf.tiny_model import Samples, tiny_model, to_batch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def batch():
    return to_batch(Samples(2, 3).samples)


@pytest.fixture
def model():
    return tiny_model().eval()


def predict(model, batch):
    with torch.no_grad():
        outputs = model(**{**batch, "labels": None})
    return outputs.logits, outputs.pred_boxes


def assert_same(first, second, batch):
    """The same tensors and the same predictions, bit for bit."""
    first_state, second_state = first.state_dict(), second.state_dict()
    assert list(first_state) == list(second_state)
    assert [name for name, x in first_state.items() if not torch.equal(x, second_state[name])] == []
    assert all(torch.equal(a, b) for a, b in zip(predict(first, batch), predict(second, batch), strict=True))


@pytest.mark.parametrize(
    ("saving", "loading", "files"),
    [
        ({"max_shard_size": "100KB"}, {}, 5),
        ({"variant": "fp16"}, {"variant": "fp16"}, 1),
        ({}, {"device_map": "cpu"}, 1),
        ({}, {"attn_implementation": "eager"}, 1),
    ],
)
def test_ways_of_saving_and_loading(saving, loading, files, model, batch, tmp_path):
    if "device_map" in loading:
        pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path, **saving)
    weights = [path.name for path in tmp_path.glob("*.safetensors")]
    assert len(weights) >= files
    assert all(saving.get("variant", "") in name for name in weights)
    assert_same(model, AutoModelForObjectDetection.from_pretrained(tmp_path, **loading), batch)


def test_the_bare_model_gives_a_detector_its_weights(model, batch, tmp_path):
    model.model.save_pretrained(tmp_path)
    assert_same(model, DinoDetrForObjectDetection.from_pretrained(tmp_path).eval(), batch)


def test_a_pickled_model_is_the_same(model, batch):
    assert_same(model, pickle.loads(pickle.dumps(model)), batch)


def test_evaluation_is_deterministic(model, batch):
    assert all(torch.equal(a, b) for a, b in zip(predict(model, batch), predict(model, batch), strict=True))


@pytest.mark.parametrize("kind", [DinoDetrModel, DinoDetrForObjectDetection])
def test_images_and_mask_are_the_first_arguments(kind):
    assert list(inspect.signature(kind.forward).parameters)[1:4] == ["pixel_values", "pixel_mask", "labels"]
    assert kind.main_input_name == "pixel_values"


def flat(value):
    if torch.is_tensor(value):
        return [value]
    return [x for item in (value.values() if isinstance(value, dict) else value) for x in flat(item)]


def test_tuples_hold_what_dicts_hold(model, batch):
    asked = {**batch, "output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        found, listed = model(**asked), model(**asked, return_dict=False)
    assert isinstance(listed, tuple)
    assert list(found)[:4] == ["loss", "loss_dict", "logits", "pred_boxes"]
    assert len(flat(found)) == len(flat(listed)) > 30
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(listed), strict=True))


def test_hidden_states_are_on_the_way_to_the_outputs(model, batch):
    outputs = model.train()(batch["pixel_values"], batch["pixel_mask"], output_hidden_states=True)
    states = [*outputs.encoder_hidden_states, *outputs.decoder_hidden_states]
    for state in states:
        state.retain_grad()
    outputs.logits.sum().backward()
    assert len(states) == 2 + 3
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in states)


def test_a_step_of_training_reaches_every_parameter(model, batch):
    model.train()
    torch.manual_seed(1)
    loss = model(**batch).loss
    loss.backward()
    assert [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None] == []
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    torch.manual_seed(1)
    assert model(**batch).loss < loss


# On the hub, and without this package or transformers


class Hub:
    """In the place of the hub's API: keeps the names of the files that are sent."""

    def __init__(self):
        self.sent = set()

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id, url="")

    def create_commit(self, repo_id, operations, **options):
        self.sent |= {operation.path_in_repo for operation in operations}
        return SimpleNamespace(pr_url=None)


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    for name in ("create_repo", "create_commit"):
        send = getattr(found, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda _, *args, send=send, **options: send(*args, **options))
        for module in ("utils.hub", "modeling_utils", "configuration_utils", "image_processing_base"):
            monkeypatch.setattr(f"transformers.{module}.{name}", send, raising=False)  # before 5.4
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    for module in ("modeling_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{module}.create_and_tag_model_card", lambda *_, **__: card)
    return found


def test_what_is_pushed_to_the_hub_is_whole(model, hub, tmp_path):
    model.save_pretrained(str(tmp_path / "one"), push_to_hub=True, repo_id="person/one")
    assert {"config.json", "model.safetensors", "dino_detr.py"} <= hub.sent
    DinoDetrImageProcessor().push_to_hub("person/one")
    assert "preprocessor_config.json" in hub.sent


LOADED = """
import sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline
assert not any(name.split(".")[0] == "dino" for name in sys.modules)
options = {"pretrained_model_name_or_path": sys.argv[1], "trust_remote_code": True}
model, processor = AutoModelForObjectDetection.from_pretrained(**options), AutoImageProcessor.from_pretrained(**options)
model.save_pretrained(sys.argv[2]), processor.save_pretrained(sys.argv[2])
found = pipeline("object-detection", model=model, image_processor=processor, threshold=0)(Image.new("RGB", (80, 60)))
print(type(model).__module__, type(processor).__module__, len(found) > 0)
"""


def run_python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_a_folder_loads_offline_without_importing_this_package(model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    DinoDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(first)
    done = run_python(LOADED, first, second, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.stdout.split() == [
        "dino.hf.modeling_dino_detr",
        "dino.hf.image_processing_dino_detr",
        "True",
    ], done.stderr
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {
        path.name: path.read_bytes() for path in second.iterdir()
    }


def test_a_folder_says_which_package_it_needs(monkeypatch, tmp_path):
    write_remote_code(tmp_path)
    monkeypatch.setitem(sys.modules, "dino.hf", None)
    with pytest.raises(ImportError, match=r'^This model needs dino-detectron2: pip install "dino-detectron2\[hf\]"$'):
        runpy.run_path(str(tmp_path / "dino_detr.py"))


def test_a_persons_file_of_the_same_name_is_kept(model, tmp_path):
    file = tmp_path / "dino_detr.py"
    file.write_text("print('mine')\n")
    with pytest.warns(UserWarning, match=r"dino_detr.py is no file of this project and stays as it is"):
        model.save_pretrained(tmp_path)
    assert file.read_text() == "print('mine')\n"
    file.unlink()
    write_remote_code(tmp_path)
    file.write_text(file.read_text() + "# of an earlier version\n")
    write_remote_code(tmp_path)
    assert "earlier" not in file.read_text()


def test_the_hubs_names_in_auto_map_are_not_saved(model, tmp_path):
    model.config.auto_map = {"AutoConfig": "person/one--dino_detr.DinoDetrConfig"}
    model.save_pretrained(tmp_path)
    assert "person" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("None", 'dino.hf needs transformers: pip install "dino-detectron2[hf]"'),
        (
            "types.SimpleNamespace(__version__='4.40.1')",
            'dino.hf needs transformers 4.57 or newer, not 4.40.1: pip install -U "dino-detectron2[hf]"',
        ),
    ],
)
def test_without_transformers_one_line_names_the_extra(library, message):
    done = run_python(f"import sys, types; sys.modules['transformers'] = {library}; import dino.hf")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {message}"

"""Folders of transformers, and of its Trainer, stand for a checkpoint wherever one is named."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dino
from dino.modeling.detector import Preprocessing
from dino.utils.files import DataError, UserError
from dino.weights import load_weights, locate, read_content
from dino.weights.description import detector_from_checkpoint, read_category_ids, read_description
from dino.weights.folder_json import MOST_TEXT, find_newest, find_weights, read_index, read_json
from dino.weights.inferred_description import open_checkpoint

from ..file_server import Reply
from ..tiny import random_batch
from .folders import IDS, NAMES, PREPROCESSING, change_json, copy, write_tiny

ROUNDS = 300  # changed folders
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder and its detector."""
    folder = tmp_path_factory.mktemp("written") / "model"
    return folder, write_tiny(folder)


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the folder, for changes."""
    return copy(written[0], tmp_path / "model")


def equal(first, second):
    a, b = (one.state_dict() for one in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def split(folder, names=SHARDS):
    """Put the weights of a folder into two files with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(state)
    places = {key: names[index % 2] for index, key in enumerate(keys)}
    for name in names:
        save_file({key: state[key] for key in keys if places[key] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@torch.no_grad()
def test_a_folder_is_a_checkpoint(written):
    folder, detector = written
    found = dino.load(folder)
    assert equal(found, detector)
    assert (found.names, found.category_ids, found.preprocessing) == (NAMES, IDS, PREPROCESSING)
    assert locate(str(folder)) == str(folder / "model.safetensors")
    assert equal(dino.load(locate(str(folder))), detector)  # of the file alone
    predictor = dino.Predictor.from_checkpoint(folder, device="cpu")
    assert predictor.names == NAMES
    batch = random_batch(1)
    assert torch.equal(found.network(*batch).decoder.boxes, detector.network(*batch).decoder.boxes)


def test_several_files(folder, written):
    split(folder)
    assert locate(str(folder)) == str(folder / "model.safetensors.index.json")
    assert locate(locate(str(folder))) == locate(str(folder))
    assert equal(dino.load(folder), written[1])


def test_a_file_of_pytorch(folder, written):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert equal(dino.load(folder), written[1])


def test_half_precision(folder, written):
    state = {key: x.bfloat16() if x.is_floating_point() else x for key, x in written[1].network.state_dict().items()}
    save_file(
        {f"model.network.{key}": x.clone().contiguous() for key, x in state.items()}, folder / "model.safetensors"
    )
    found = dino.load(folder).network
    assert {x.dtype for x in found.parameters()} == {torch.float32}
    torch.testing.assert_close(found.level_embed, written[1].network.level_embed, rtol=1e-2, atol=1e-2)


def test_the_output_of_a_trainer(written, tmp_path, capsys):
    run = tmp_path / "output"
    for step in (9, 20, 100):
        copy(written[0], run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}/training_args.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    (run / "checkpoint-100/model.safetensors").unlink()  # a process was killed while it wrote this one
    (run / "checkpoint-20/preprocessor_config.json").unlink()
    (run / "runs").mkdir()
    assert locate(str(run)) == str(run / "checkpoint-20/model.safetensors")
    assert capsys.readouterr().err == f"{run}: taking checkpoint-20\n"
    detector = dino.load(run / "checkpoint-20")
    assert (detector.preprocessing, detector.category_ids) == (Preprocessing(), IDS)
    copy(written[0], tmp_path / "other").rename(tmp_path / "taken")
    for path in (tmp_path / "taken").iterdir():  # `save_model` at the end of a training
        path.rename(run / path.name)
    assert locate(str(run)) == str(run / "model.safetensors")
    assert find_newest(tmp_path) is None


def test_the_folder_of_a_run_stands_for_its_best_checkpoint(folder):
    (folder / "model_best.pth").write_bytes(b"")
    assert locate(str(folder)) == str(folder / "model_best.pth")


def test_a_training_starts_from_a_folder(written):
    target = dino.load(written[0])
    for parameter in target.parameters():
        torch.nn.init.zeros_(parameter.data)
    report = load_weights(target, locate(str(written[0])), classes=["blue", "red", "green"], class_rows="name")
    assert not report.fresh
    heads = [one.network.decoder.class_heads[0].bias for one in (target, written[1])]
    assert torch.equal(heads[0], heads[1][[2, 0, 1]])
    report = load_weights(target, locate(str(written[0])), parts="backbone")
    assert report.format == "own"


@pytest.mark.parametrize("kind", ["detr", "rt_detr", "deformable_detr", "\x1b[31m", 5, None])
def test_other_models_are_refused(folder, kind):
    change_json(folder / "config.json", model_type=... if kind is None else kind)
    shown = {"\x1b[31m": r"the type \\x1b\[31m", None: "no stated type"}.get(kind, f"the type {kind}")
    with pytest.raises(DataError, match=rf"holds a model of {shown} \(model_type in config.json\): only dino_detr"):
        locate(str(folder))
    assert read_content(folder / "model.safetensors").keys() == {"model"}  # the file alone


def test_folders_that_hold_no_model(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        DataError, match=r"model lacks its weights: model\.safetensors was expected beside config\.json"
    ):
        locate(str(folder))
    change_json(folder / "config.json", model_type=...)
    assert find_weights(folder) is None  # any program may have such a file
    with pytest.raises(DataError, match=r"this folder holds no checkpoint .*of transformers config.json and model"):
        locate(str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("[1]", "an object was expected, not list"),
        ("[" * 100_000, "is no JSON"),
        ('{"a": ' * 100_000, "is no JSON"),
        (f'{{"a": {"9" * 5000}}}', "is no JSON"),
        (b"\xff\xfe\xff", "is no JSON"),
        (" " * (MOST_TEXT + 1), "has more than 16,777,216 bytes"),
    ],
)
def test_json_is_bounded(folder, text, message):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=rf"can't read .*config\.json: .*{message}"):
        locate(str(folder))
    with pytest.raises(DataError, match=r"can't read .*missing: No such file"):
        read_json(folder / "missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_map": None}, "weight_map, a dict of tensor -> file, was expected"),
        ({"weight_map": {"a": "../model.safetensors"}}, r"\.\./model\.safetensors is no name of a file"),
        ({"weight_map": {"a": "/etc/passwd"}}, "/etc/passwd is no name"),
        ({"weight_map": {"a": "..\\a.safetensors"}}, "is no name of a file"),
        ({"weight_map": {"a": ".hidden.bin"}}, "is no name of a file"),
        ({"weight_map": {"a": 3}}, "3 is no name of a file"),
        ({"weight_map": {"a": "x.safetensors"}}, "lacks x.safetensors, which model.safetensors.index.json names"),
        ({"weight_map": {str(n): f"{n}.bin" for n in range(1001)}}, "it names 1,001 files"),
        ({"weight_map": {"unknown": SHARDS[0]}}, f"{SHARDS[0]} lacks unknown"),
    ],
)
def test_an_index_stays_in_its_folder(folder, change, message):
    index = split(folder) / "model.safetensors.index.json"
    change_json(index, **change)
    with pytest.raises(DataError, match=message):
        dino.load(folder)


def test_a_missing_shard_is_named(folder):
    (split(folder) / SHARDS[1]).unlink()
    with pytest.raises(DataError, match=f"lacks {SHARDS[1]}, which"):
        dino.load(folder)
    assert set(read_index(folder / "model.safetensors.index.json")) == set(SHARDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 1024, "encoder_layers": 6}, "the description has .* numbers, but the weights only"),
        ({"num_queries": 100_000}, "the description has .* numbers, but the weights only"),
        ({"encoder_layers": 1000}, "the description has more layers|numbers, but the weights only"),
        ({"decoder_layers": 3}, "lacks weights of its own model"),
        ({"backbone": "resnet5"}, "unknown torchvision backbone 'resnet5'"),
        ({"backbone": "../net"}, "backbone is .../net.: the name of a network"),
        ({"id2label": {"0": "a\x1b[0m", "1": "b", "2": "c"}}, "has control characters"),
    ],
)
def test_a_config_can_not_ask_for_more(folder, changes, message):
    change_json(folder / "config.json", **changes)
    with pytest.raises(DataError, match=message) as error:
        dino.load(folder)
    assert "\n" not in str(error.value)


def test_no_pickle_runs(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(
        b"\x80\x02cos\nsystem\nq\x00X\x0b\x00\x00\x00touch tracesq\x01\x85Rq\x02."
    )
    with pytest.raises(DataError, match=r"can't read the weights .*pytorch_model\.bin"):
        dino.load(folder)
    assert not Path("traces").exists()


JUNK = [None, True, -1, 0, 3, 1e300, float("nan"), "", "x", "../x", "os.system", [], [1], {}, {"_target_": "os.system"}]


def change_at_random(chance, folder):
    """Change a JSON file of a folder, or a few bytes of any file."""
    path = folder / chance.choice(
        ["config.json"] * 3 + ["preprocessor_config.json", "model.safetensors.index.json", *SHARDS]
    )
    if path.suffix == ".json" and chance.random() < 0.8:
        fields = json.loads(path.read_text())
        inner = [value for value in fields.values() if isinstance(value, dict) and value]
        target = chance.choice([fields, fields, *inner])
        key = chance.choice(sorted(target))
        target[key] = chance.choice([*JUNK, ..., key])
        target = {k: v for k, v in target.items() if v is not ...} if target is fields else target
        text = json.dumps({k: v for k, v in fields.items() if v is not ...}, default=str)
        path.write_text(text)
        return
    content = bytearray(path.read_bytes())
    for _ in range(chance.randrange(1, 4)):
        content[chance.randrange(min(len(content), 3000))] = chance.randrange(256)
    path.write_bytes(content[: chance.choice([len(content)] * 4 + [chance.randrange(len(content))])])


def read_description_only(folder):
    path, content = open_checkpoint(folder)
    read_description(content, path)
    read_category_ids(content, path)


@pytest.mark.parametrize(
    ("read", "rounds"),
    [
        (read_description_only, ROUNDS),
        (detector_from_checkpoint, ROUNDS // 50),
        pytest.param(detector_from_checkpoint, 3 * ROUNDS, marks=pytest.mark.slow),
    ],
)
def test_changed_folders_are_read_or_refused(folder, read, rounds):
    split(folder)
    chance, refused = random.Random(rounds), 0
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    for _ in range(rounds):
        change_at_random(chance, folder)
        try:
            read(folder)
        except DataError:
            refused += 1
        for path, content in kept.items():
            path.write_bytes(content)
    assert rounds / 3 < refused <= rounds - (rounds >= ROUNDS)


@pytest.fixture
def hub(server, monkeypatch, written):
    """A hub with the folder as org/model."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for path in written[0].iterdir():
        server.files[f"/org/model/resolve/main/{path.name}"] = Reply(path.read_bytes())
    return server


def asked(server):
    return [Path(path).name for path, _ in server.requests]


def test_a_repository_of_the_hub(hub, written, tmp_path, monkeypatch):
    files = ["config.json", "preprocessor_config.json", "model.safetensors"]
    path, content = open_checkpoint("hf://org/model")
    assert asked(hub) == files
    assert Path(path).is_relative_to(tmp_path / "cache")
    assert content["category_ids"] == IDS
    assert equal(dino.load("hf://org/model"), written[1])
    assert asked(hub) == files  # nothing is fetched twice
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate("hf://org/model") == path
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        locate("hf://org/model@v2")


def test_a_repository_in_several_files(hub, written, tmp_path):
    source = split(copy(written[0], tmp_path / "source"))
    base = "/org/model/resolve/v2"
    hub.files |= {f"{base}/{path.name}": Reply(path.read_bytes()) for path in source.iterdir()}
    for name in ("README.md", "preprocessor_config.json"):
        del hub.files[f"{base}/{name}"]
    assert equal(dino.load("hf://org/model@v2").network, written[1].network)
    expected = ["config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json", *SHARDS]
    assert sorted(asked(hub)) == sorted(expected)
    assert dino.load("hf://org/model@v2").preprocessing == Preprocessing()
    assert len(asked(hub)) == len(expected)


def test_a_repository_of_another_model(hub, written):
    reply = json.dumps({"model_type": "detr"}).encode()
    hub.files["/org/model/resolve/main/config.json"] = Reply(reply)
    with pytest.raises(DataError, match="holds a model of the type detr"):
        locate("hf://org/model")
    assert asked(hub) == ["config.json"]
    with pytest.raises(UserError, match="There is no such file"):
        locate("hf://org/other")


def test_an_index_of_the_hub_stays_in_its_folder(hub):
    base = "/org/model/resolve/main"
    del hub.files[f"{base}/model.safetensors"]
    index = json.dumps({"weight_map": {"a": "../../../x.safetensors"}}).encode()
    hub.files[f"{base}/model.safetensors.index.json"] = Reply(index)
    with pytest.raises(DataError, match="is no name of a file"):
        locate("hf://org/model")


def test_a_large_config_of_the_hub_is_refused(hub):
    hub.files["/org/model/resolve/main/config.json"] = Reply(b" " * (MOST_TEXT + 1))
    with pytest.raises(UserError, match="larger than the limit of 16,777,216 bytes"):
        locate("hf://org/model")


def test_a_folder_in_the_hubs_own_cache(server, written, tmp_path):
    snapshot = tmp_path / f"huggingface/hub/models--org--model/snapshots/{'1' * 40}"
    snapshot.mkdir(parents=True)
    for path in written[0].iterdir():
        os.symlink(path, snapshot / path.name)
    (tmp_path / "huggingface/hub/models--org--model/refs").mkdir()
    (tmp_path / "huggingface/hub/models--org--model/refs/main").write_text("1" * 40)
    assert locate("hf://org/model") == str(snapshot / "model.safetensors")
    assert server.requests == []

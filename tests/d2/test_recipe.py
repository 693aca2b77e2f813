import json
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.solver import LRMultiplier
from omegaconf import OmegaConf
from torch.overrides import TorchFunctionMode

from dino.d2 import recipe
from dino.modeling import Decoder, QuerySelection
from dino.utils.files import DataError, UserError

from ..coco_files import write_coco
from .recipes import RECIPES, ROOT, SMALL, file_arguments, load_recipe, parse, write_two_sets

R50 = ROOT / "configs/dino_r50_4scale_12ep.py"
PARTS = {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
COCO_IMAGES = 118287


def load(path):
    return LazyConfig.load(str(path))


class OnMeta(TorchFunctionMode):
    """Names and shapes only, except for the few numbers that constructors want to read."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.linspace:
            return function(*args, **{**(kwargs or {}), "device": "cpu"})
        return function(*args, **(kwargs or {}))


def build(cfg):
    """The model without memory or initialisation: names and shapes only."""
    with torch.device("meta"), OnMeta():
        return instantiate(cfg.model)


def schedule(cfg, num_images=COCO_IMAGES):
    recipe.use_epochs(cfg, num_images)
    multiplier = instantiate(cfg.lr_multiplier)
    return lambda iteration: multiplier(iteration / cfg.train.max_iter)


@pytest.fixture(scope="module")
def r50():
    cfg = load(R50)
    return cfg, build(cfg)


def test_all_recipes_are_found():
    names = {f"dino_r50_{scales}scale_{epochs}ep.py" for scales in (4, 5) for epochs in (12, 24, 36)}
    assert names | {"dino_r18_small_data.py"} <= {path.name for path in RECIPES}


LARGE = re.compile("focalnet|convnext_[sbl]|swin_l.*(36ep|o365)|vitdet_l|tuned_|dense")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow) if LARGE.search(p.stem) else p for p in RECIPES],
    ids=lambda path: path.stem,
)
def test_recipes_have_five_parts_build_and_reload(path, tmp_path):
    cfg = load(path)
    assert set(cfg) == PARTS
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert not (tmp_path / "config.yaml.pkl").exists()  # what Detectron2 leaves when the yaml can't be read back
    again = load(tmp_path / "config.yaml")
    LazyConfig.save(again, str(tmp_path / "again.yaml"))
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    model, reloaded = build(cfg), build(again)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in reloaded.state_dict().items()}
    for part in ("dataloader.train.mapper", "dataloader.test.mapper", "lr_multiplier"):
        assert type(instantiate(OmegaConf.select(again, part))) is type(instantiate(OmegaConf.select(cfg, part)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_how_to_run_them_and_what_to_expect(path):
    lines = path.read_text().splitlines()
    described = "\n".join(lines[: lines.index('"""') + 1])
    assert "python tools/lazyconfig_train_net.py --config-file" in described
    assert str(path.relative_to(ROOT)) in described
    if path.parent.name == "configs" and path.parent.parent == ROOT:
        assert "Published for this setting" in described
        assert "Not trained here" in described


def test_number_of_parameters(r50):
    """The official program's; with a pair of heads per layer, as counted in detrex', which has 80 classes too."""
    cfg, model = r50
    counts = {p: p.numel() for p in model.parameters()}
    assert sum(counts.values()) == 46_893_182 - 11 * (2 * 257 + 256) - 256  # 91 classes, and a label of no class
    separate = cfg.copy()
    separate.model.network.decoder._target_ = Decoder
    assert sum(p.numel() for p in build(separate).parameters()) == 47_650_316
    frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    assert sum(frozen.values()) == 222_400  # the official program freezes conv1 and layer1; its norms are buffers
    assert all(".stem." in name or ".res2." in name for name in frozen)


@pytest.mark.parametrize(("scales", "strides"), [(4, [8, 16, 32]), (5, [4, 8, 16, 32])])
def test_levels(scales, strides):
    network = build(load(ROOT / f"configs/dino_r50_{scales}scale_12ep.py")).network
    assert network.level_embed.shape == (scales, 256)
    assert [network.neck.backbone.output_shape()[name].stride for name in network.neck.in_features] == strides
    assert len(network.neck.lateral) == len(strides)
    assert len(network.neck.extra_levels) == 1


def test_published_settings(r50):
    cfg, model = r50
    network = model.network
    assert (len(network.encoder.layers), len(network.decoder.layers)) == (6, 6)
    assert type(network.query_selection) is QuerySelection  # no patterns: one content for each box
    assert network.query_selection.content.weight.shape == (900, 256)
    assert network.denoising.num_denoising == 100
    assert (network.denoising.label_noise, network.denoising.box_noise) == (0.5, 1.0)
    assert network.encoder.layers[0].feed_forward.linear1.out_features == 2048
    assert model.preprocessing.max_detections == 300
    assert cfg.dataloader.train.total_batch_size == 16
    assert cfg.train.clip_norm == 0.1
    assert cfg.model.pixel_mean == [123.675, 116.28, 103.53]


def test_classes_are_stated_once(r50):
    cfg = load(R50)
    cfg.model.num_classes = 7
    model = build(cfg)
    network = model.network
    assert model.num_classes == 7
    assert network.denoising.label_embed.num_embeddings == 7
    assert network.query_selection.class_head.out_features == 7
    assert {head.out_features for head in network.decoder.class_heads} == {7}
    difference = sum(p.numel() for p in r50[1].parameters()) - sum(p.numel() for p in model.parameters())
    assert difference == (80 - 7) * (2 * 257 + 256)  # heads of encoder and decoder, labels


def test_optimizer_groups(r50):
    cfg, model = r50
    cfg = cfg.copy()
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    named = dict(model.named_parameters())
    assert set(rates) == {p for p in named.values() if p.requires_grad}
    for name, parameter in named.items():
        if parameter.requires_grad:
            assert rates[parameter] == pytest.approx(1e-5 if "backbone" in name else 1e-4), name


def test_small_recipe_trains_everything_at_one_rate():
    cfg = load(SMALL)
    model = build(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.optimizer.lr}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(("epochs", "drop"), [(12, 11), (24, 20), (36, 30)])
@pytest.mark.parametrize("scales", [4, 5])
def test_epochs_become_iterations(epochs, drop, scales):
    cfg = load(ROOT / f"configs/dino_r50_{scales}scale_{epochs}ep.py")
    factor = schedule(cfg)
    per_epoch = 7393
    assert per_epoch == math.ceil(COCO_IMAGES / 16)
    assert cfg.train.max_iter == epochs * per_epoch
    assert cfg.train.eval_period == cfg.train.checkpointer.period == per_epoch
    iterations = [0, drop * per_epoch - 1, drop * per_epoch, epochs * per_epoch - 1]
    assert [factor(i) for i in iterations] == [1.0, 1.0, 0.1, 0.1]


def test_published_schedule_in_numbers():
    cfg = load(R50)
    factor = schedule(cfg)
    assert cfg.train.max_iter == 88716
    assert (factor(81322), factor(81323)) == (1.0, 0.1)


def test_the_optimizer_gets_the_scheduled_rate():
    """Through Detectron2's scheduler, as the training loop uses it."""
    cfg = load(R50)
    cfg.train.max_iter = 12
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter, last_iter=-1)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-4] * 11 + [1e-5])


@pytest.mark.parametrize(("between", "expected"), [(1, 25), (4, 100), (0.5, 12)])
def test_epochs_between_evaluations(between, expected):
    cfg = load(R50)
    cfg.train.eval_epochs = between
    recipe.use_epochs(cfg, 400)
    assert cfg.train.eval_period == cfg.train.checkpointer.period == expected


def test_stated_iterations_are_kept():
    cfg = load(R50)
    cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period = 50, 0, 7
    recipe.use_epochs(cfg, COCO_IMAGES)
    assert (cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period) == (50, 0, 7)


@pytest.mark.parametrize(("images", "epochs", "expected"), [(3, 1, 1), (33, 0.5, 2), (1, 0.01, 1), (32, 3, 6)])
def test_few_images_and_parts_of_epochs(images, epochs, expected):
    cfg = load(SMALL)
    cfg.dataloader.train.total_batch_size = 16
    cfg.train.epochs, cfg.train.max_iter = epochs, None
    recipe.use_epochs(cfg, images)
    assert cfg.train.max_iter == expected


def test_stated_epochs_replace_the_iterations_of_a_recipe():
    """A recipe for small data states iterations; those that the command line states too are kept."""
    train = load_recipe(config=SMALL).train
    assert (train.max_iter, train.eval_period, train.checkpointer.period) == (2500, 500, 500)
    train = load_recipe("train.epochs=3", config=SMALL).train
    assert (train.max_iter, train.eval_period, train.checkpointer.period) == (None, 500, 500)
    train = load_recipe("train.eval_epochs=2", "train.checkpointer.period=7", config=SMALL).train
    assert (train.max_iter, train.eval_period, train.checkpointer.period) == (2500, None, 7)
    train = load_recipe("train.epochs=3", "train.max_iter=90", config=SMALL).train
    assert (train.epochs, train.max_iter) == (3, 90)


@pytest.mark.parametrize("epochs", [5, 11, 0.5])
def test_schedules_that_do_not_fit_the_epochs_are_refused(epochs):
    with pytest.raises(UserError, match=rf"train\.epochs={epochs}: .* Override lr_multiplier\.milestones too"):
        load_recipe(f"train.epochs={epochs}", config=R50)
    load_recipe("train.epochs=5", "lr_multiplier.milestones=[4]", config=R50)


@pytest.mark.parametrize("epochs", [0.5, 5, 100])
def test_the_schedule_of_the_small_recipe_fits_any_epochs(epochs):
    cfg = load_recipe(f"train.epochs={epochs}", config=SMALL)
    factor = schedule(cfg, 400)
    last = cfg.train.max_iter
    assert factor(0) == pytest.approx(0.02)
    assert factor(last // 2) == 1
    assert factor(last - 1) == pytest.approx(0.1)


def test_data_of_the_command_line(tmp_path):
    train, val = write_two_sets(tmp_path, category_ids=(7, 40, 900))
    cfg = load_recipe(*file_arguments(train, val))
    assert cfg.model.num_classes == 3
    assert OmegaConf.select(cfg, "model.network.decoder.num_classes") == 3
    for name, files in (("custom_train", train), ("custom_val", val)):
        assert name in DatasetCatalog
        assert MetadataCatalog.get(name).json_file == files.annotations
        assert MetadataCatalog.get(name).thing_classes == ["red", "green", "blue"]
    assert cfg.dataloader.evaluator.dataset_name == "custom_val"
    images = instantiate(cfg.dataloader.train.dataset)
    assert [len(x["annotations"]) for x in images] == [2, 0, 3, 1]
    assert instantiate(cfg.dataloader.test.dataset)[0]["file_name"].startswith(val.images)


def test_data_of_the_command_line_is_in_the_saved_recipe(tmp_path):
    """So that the config.yaml of a run can be run again by itself, from another folder too."""
    cfg = load_recipe(*file_arguments(*write_two_sets(tmp_path)))
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert not (tmp_path / "config.yaml.pkl").exists()
    again = load_recipe(config=tmp_path / "config.yaml")
    assert OmegaConf.to_container(again.dataloader.train.dataset) == {
        "_target_": "dino.d2.data_loading.dataset",
        "name": "custom_train",
        "annotations": str(tmp_path / "train/annotations.json"),
        "images": str(tmp_path / "train"),
        "crowd": "ignore",
        "filter_empty": False,
    }
    assert again.model.num_classes == 3


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    write_two_sets(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = [f"--{split}-{what}" for split in ("train", "val") for what in ("json", "images")]
    paths = [path for split in ("train", "val") for path in (f"{split}/annotations.json", split)]
    cfg = load_recipe(*[x for pair in zip(words, paths, strict=True) for x in pair])
    assert cfg.dataloader.train.dataset.images == str(tmp_path / "train")
    assert cfg.dataloader.test.dataset.annotations == str(tmp_path / "val/annotations.json")


def test_evaluation_needs_validation_data_only(tmp_path):
    cfg = load_recipe("--eval-only", *file_arguments(val=write_coco(tmp_path)))
    assert cfg.model.num_classes == 3


@pytest.mark.parametrize("missing", ["--train-images", "--val-json"])
def test_half_a_data_set_is_refused(tmp_path, missing):
    words = file_arguments(*write_two_sets(tmp_path))
    place = words.index(missing)
    del words[place : place + 2]
    split = missing.split("-")[2]
    with pytest.raises(UserError, match=rf"--{split}-json and --{split}-images belong together"):
        load_recipe(*words)


def test_training_data_without_validation_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="--train-json without --val-json"):
        load_recipe(*file_arguments(train=write_coco(tmp_path)))


def test_other_classes_in_validation_are_refused(tmp_path):
    train, val = write_two_sets(tmp_path)
    val.change(lambda content: content["categories"][2].update(name="azure"))
    with pytest.raises(DataError, match=r"only in training \['blue'\], only in validation \['azure'\]"):
        load_recipe(*file_arguments(train, val))


def test_classes_in_another_order_are_refused(tmp_path):
    train, val = write_two_sets(tmp_path)

    def swap(content):
        first, second, _ = content["categories"]
        first["name"], second["name"] = second["name"], first["name"]

    val.change(swap)
    with pytest.raises(DataError, match="the same names in another order"):
        load_recipe(*file_arguments(train, val))


def test_number_of_classes_that_disagrees_is_refused(tmp_path):
    words = file_arguments(*write_two_sets(tmp_path))
    with pytest.raises(UserError, match=r"num_classes=5, .* 3 classes: write model\.num_classes=3"):
        load_recipe(*words, "model.num_classes=5")
    assert load_recipe(*words, "model.num_classes=3").model.num_classes == 3


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optimiser.lr=1", "optimizer.lr"),
        ("train.max_itr=5", "train.max_iter"),
        ("model.network.query_selection.num_query=10", "model.network.query_selection.num_queries"),
        ("dataloader.train.mapper.augmentations.7.prob=0", None),
        ("lr=1", None),
        ("train.amp.enabled.now=1", None),
        ("backbone.freeze_at=1", None),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(tmp_path, override, nearest):
    words = file_arguments(*write_two_sets(tmp_path))
    with pytest.raises(UserError, match=r"the recipe has no key .*; the nearest is ") as caught:
        load_recipe(*words, override)
    assert repr(override.split("=")[0]) in str(caught.value)
    if nearest:
        assert str(caught.value).endswith(repr(nearest))


@pytest.mark.parametrize("word", ["optimizer.lr", "resume", "-x"])
def test_what_is_no_override_is_refused(tmp_path, word):
    words = file_arguments(*write_two_sets(tmp_path))
    with pytest.raises((UserError, SystemExit)):
        load_recipe(*words, word)


def test_overrides_of_interpolated_and_listed_keys(tmp_path):
    words = file_arguments(*write_two_sets(tmp_path))
    overrides = [
        "model.network.decoder.hidden_dim=64",
        "dataloader.train.mapper.augmentations.1.prob=0",
        "train.amp.enabled=True",
        "train.max_iter=5",
    ]
    cfg = load_recipe(*words, *overrides)
    assert cfg.model.network.decoder.hidden_dim == 64
    assert cfg.model.network.encoder.hidden_dim == 512
    assert cfg.dataloader.train.mapper.augmentations[1].prob == 0
    assert cfg.train.amp.enabled is True
    assert cfg.train.max_iter == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_cpu_is_used_where_there_is_no_gpu(tmp_path):
    assert load_recipe(*file_arguments(*write_two_sets(tmp_path))).train.device == "cpu"


def test_missing_recipes_are_named(tmp_path):
    for path in (tmp_path / "absent.py", ""):
        with pytest.raises(UserError, match="recipe not found"):
            load_recipe(config=path)


def test_incomplete_recipes_are_named(tmp_path):
    path = tmp_path / "half.py"
    path.write_text("model = dict(x=1)\ntrain = dict(y=2)\n")
    with pytest.raises(UserError, match=r"half\.py is no recipe: .* dataloader, optimizer, lr_multiplier"):
        load_recipe(config=path)


def test_faulty_data_of_the_command_line_are_named(tmp_path):
    train, val = write_two_sets(tmp_path)
    val.change(lambda content: content["images"][0].update(file_name="../../secret.png"))
    with pytest.raises(DataError, match=r"val/annotations\.json: file_name '\.\./\.\./secret\.png' leaves"):
        load_recipe(*file_arguments(train, val))


def choose_output(folder, *words):
    """The output folder that the program would use."""
    args = parse(*words)
    cfg = LazyConfig.apply_overrides(load(SMALL), [f"train.output_dir={folder}", *args.opts])
    with recipe.claim_output(cfg, eval_only=args.eval_only, resume=args.resume):
        return Path(cfg.train.output_dir)


def test_evaluation_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--eval-only needs weights: write train\.init_checkpoint=PATH"):
        choose_output(tmp_path, "--eval-only")


def test_an_evaluation_gets_a_folder_of_its_own(tmp_path):
    words = ["--eval-only", "train.init_checkpoint=somewhere.pth"]
    assert choose_output(tmp_path, *words) == tmp_path / "evaluation"
    (tmp_path / "evaluation").mkdir()
    assert choose_output(tmp_path, *words) == tmp_path / "evaluation.1"


def test_folders_of_an_earlier_run_are_refused_and_left_alone(tmp_path):
    (tmp_path / "model_0000004.pth").write_bytes(b"precious")
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        UserError, match=r"holds a run \(model_0000004\.pth, last_checkpoint\): add --resume, choose another"
    ):
        choose_output(tmp_path)
    assert choose_output(tmp_path, "--resume") == tmp_path
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() <= {"run.lock", "started_by"}


def test_fresh_folders_are_accepted(tmp_path):
    assert choose_output(tmp_path / "new") == tmp_path / "new"
    assert not (tmp_path / "new").exists()


def test_published_classes_are_those_of_coco():
    """No class list of our own: the recipe takes it from Detectron2's registered data."""
    cfg = load_recipe(config=R50)
    assert cfg.model.num_classes == 80
    assert json.dumps(recipe.names_of(cfg.dataloader.train.dataset)).startswith('["person", "bicycle"')

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from PIL import Image

from dino.d2 import DINODetector, add_dino_config, build_adamw
from dino.d2.data_loading import dataset
from dino.data.images import read_image

from ..coco_files import write_coco


def tiny_config(folder, *overrides):
    """A ResNet-18 and layers of width 32 for images of 64 pixels."""
    cfg = get_cfg()
    add_dino_config(cfg)
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.DINO.NUM_CLASSES": 3,
        "MODEL.DINO.NUM_QUERIES": 20,
        "MODEL.DINO.NUM_DENOISING": 8,
        "MODEL.DINO.EMBED_DIM": 64,
        "MODEL.DINO.NUM_HEADS": 4,
        "MODEL.DINO.HIDDEN_DIM": 32,
        "MODEL.DINO.ENCODER_LAYERS": 1,
        "MODEL.DINO.DECODER_LAYERS": 2,
        "MODEL.DINO.MAX_DETECTIONS": 10,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "DATASETS.TRAIN": ("yacs_train",),
        "DATASETS.TEST": (),
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
        "OUTPUT_DIR": str(folder),
    }
    cfg.merge_from_list([x for pair in options.items() for x in pair] + list(overrides))
    return cfg


@pytest.fixture
def files(tmp_path):
    """The data set `yacs_train`, registered as DefaultTrainer wants it."""
    files = write_coco(tmp_path / "data", category_ids=(7, 40, 900))
    dataset("yacs_train", *files)
    return files


def test_settings_are_the_published_ones():
    cfg = get_cfg()
    add_dino_config(cfg)
    with torch.device("meta"):
        cfg.MODEL.DEVICE = "meta"
        model = build_model(cfg)
    assert isinstance(model, DINODetector)
    assert sum(p.numel() for p in model.parameters()) == 47_650_316
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 222_400
    assert model.preprocessing.max_detections == 300
    assert model.network.neck.in_features == ["res3", "res4", "res5"]


def test_default_trainer_and_predictor(files, tmp_path):
    """Detectron2's own classes, unchanged: two steps of training, then predictions."""
    cfg = tiny_config(tmp_path / "output")
    (tmp_path / "output").mkdir()
    torch.manual_seed(0)
    trainer = DefaultTrainer(cfg)
    assert isinstance(trainer.model, DINODetector)
    before = trainer.model.network.decoder.class_heads[0].weight.clone()
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert not torch.equal(trainer.model.network.decoder.class_heads[0].weight, before)
    cfg.MODEL.WEIGHTS = str(tmp_path / "output/model_final.pth")
    predictor = DefaultPredictor(cfg)
    for ours, theirs in zip(predictor.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    image = read_image(files.images + "/image_1.png")[:, :, ::-1]
    found = predictor(image)["instances"]
    assert found.image_size == image.shape[:2]
    assert len(found) == 10


def test_score_threshold(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    scores = [DefaultPredictor(tiny_config(tmp_path, "MODEL.DINO.SCORE_THRESH_TEST", s))(picture) for s in (0.0, 1.0)]
    assert [len(found["instances"]) for found in scores] == [10, 0]


def test_configs_from_before_the_score_threshold_work(tmp_path):
    cfg = tiny_config(tmp_path)
    del cfg.MODEL.DINO["SCORE_THRESH_TEST"]
    assert build_model(cfg).score_thresh == 0


def test_adamw_as_published(tmp_path):
    cfg = tiny_config(tmp_path)
    model = build_model(cfg)
    optimizer = build_adamw(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.network.neck.backbone.stem.conv1.weight)] == pytest.approx(1e-5)
    assert rates[id(model.network.neck.lateral[0][0].weight)] == pytest.approx(1e-4)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert total == pytest.approx(0.1, rel=1e-3)


def test_visualizer_draws_what_the_predictor_finds(files, tmp_path):
    visualizer = pytest.importorskip("detectron2.utils.visualizer", reason="OpenCV is not installed")
    image = read_image(files.images + "/image_1.png")
    found = DefaultPredictor(tiny_config(tmp_path))(image[:, :, ::-1])["instances"].to("cpu")
    metadata = MetadataCatalog.get("yacs_train")
    assert metadata.thing_classes == ["red", "green", "blue"]
    drawn = visualizer.Visualizer(image, metadata).draw_instance_predictions(found).get_image()
    assert drawn.shape == image.shape


def first_pixel(model, call):
    """The normalised colour of the upper left pixel that reaches the network."""
    seen = []
    hook = model.network.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, :, 0, 0]))
    call()
    hook.remove()
    return seen[0]


RED = torch.tensor([(255 - 123.675) / 58.395, (0 - 116.28) / 57.12, (0 - 103.53) / 57.375])


def test_red_is_the_first_channel_of_the_predictor(tmp_path):
    """Detectron2's predictor takes images as OpenCV reads them, blue first."""
    predictor = DefaultPredictor(tiny_config(tmp_path))
    red = np.zeros((64, 64, 3), np.uint8)
    red[:, :, 2] = 255
    torch.testing.assert_close(first_pixel(predictor.model, lambda: predictor(red)), RED)


def test_red_is_the_first_channel_in_training(files, tmp_path):
    cfg = tiny_config(tmp_path)
    red = np.zeros((64, 72, 3), np.uint8)
    red[:, :, 0] = 255
    for number in range(1, 5):
        Image.fromarray(red).save(f"{files.images}/image_{number}.png")
    batch = next(iter(build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))))
    model = build_model(cfg)
    torch.testing.assert_close(first_pixel(model, lambda: model(batch)), RED)


def test_images_without_objects_reach_the_training(files, tmp_path):
    loader = build_detection_train_loader(tiny_config(tmp_path, "SOLVER.IMS_PER_BATCH", 4))
    seen = set()
    for _, batch in zip(range(6), loader, strict=False):
        seen |= {(x["file_name"].rsplit("/", 1)[1], len(x["instances"])) for x in batch}
    assert ("image_2.png", 0) in seen


def all_items(node, prefix=""):
    """Every dotted key and its value; tuples and lists count as the same, as in a yaml file."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from all_items(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def test_every_setting_is_one_that_detectron2_reads():
    """A misspelt key, or one of another Detectron2, would be added without a word and change nothing."""
    cfg = get_cfg()
    add_dino_config(cfg)
    new = dict(all_items(cfg)).keys() - dict(all_items(get_cfg())).keys()
    assert new
    assert {key for key in new if not key.startswith("MODEL.DINO.")} == set()


def test_gradients_are_clipped(tmp_path):
    cfg = tiny_config(tmp_path, "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.BASE_LR", 1.0)
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(cfg, model)
    model(torch.full((1, 2), 100.0)).sum().backward()
    optimizer.step()
    assert (model.weight - before).norm().item() == pytest.approx(0.1, rel=1e-3)


def test_settings_survive_a_file(tmp_path):
    cfg = tiny_config(tmp_path, "MODEL.DINO.NUM_QUERIES", 33)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_dino_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"))
    for part in ("INPUT", "SOLVER", "DATALOADER"):
        ours, theirs = (dict(all_items(c[part])) for c in (cfg, again))
        assert ours == theirs
    assert again.MODEL.DINO == cfg.MODEL.DINO


def test_a_wrong_number_of_classes_is_named(files, tmp_path):
    """The yacs road does not know the data when it builds the model; the first label that does not fit says so."""
    cfg = tiny_config(tmp_path, "MODEL.DINO.NUM_CLASSES", 1, "SOLVER.IMS_PER_BATCH", 4)
    model = build_model(cfg)
    batch = next(iter(build_detection_train_loader(cfg)))
    with pytest.raises(ValueError, match=r"image_\d\.png: label [12] is not in \[0, 1\)"):
        model(batch)

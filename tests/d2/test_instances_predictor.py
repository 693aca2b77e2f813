import os
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from detectron2.structures import Instances

from dino.d2.data_loading import ShortSide, TestMapper
from dino.d2.instances_predictor import InstancesPredictor
from dino.d2.meta_arch import DINODetector
from dino.data.images import list_images, read_image
from dino.inference.predictor import Predictor
from dino.utils.files import DataError
from dino.weights.description import Preprocessing, model_from_checkpoint

from ..inference.test_predictor import equal, picture, write_checkpoint
from ..tiny import default_criterion

BCCD = Path(os.environ.get("DINO_BCCD", Path(__file__).parents[3] / "shared/data/bccd"))
PREPROCESSING = Preprocessing(short_side=200, max_size=260, max_detections=36)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    write_checkpoint(path, preprocessing=PREPROCESSING)
    return path


def test_the_contract_of_the_default_predictor(checkpoint):
    predict = InstancesPredictor.from_checkpoint(checkpoint, device="cpu")
    pixels = picture()
    instances = predict(pixels)["instances"]
    assert isinstance(instances, Instances)
    assert instances.image_size == (72, 100)
    found = Predictor.from_checkpoint(checkpoint, device="cpu", score_thresh=0)(pixels, channels="BGR")
    assert torch.equal(instances.pred_boxes.tensor, found.clip().boxes)
    assert torch.equal(instances.scores, found.scores)
    assert torch.equal(instances.pred_classes, found.labels)
    assert not equal(found, Predictor.from_checkpoint(checkpoint, device="cpu", score_thresh=0)(pixels))
    assert predict.metadata.thing_classes == ["red", "green", "blue"]
    with pytest.raises(DataError, match="uint8"):
        predict(pixels.astype("float32"))


def raw_outputs(network):
    """Keeps what a network returned last: (proposals (Q, 4), logits (Q, C), boxes (Q, 4))."""
    kept = {}

    def keep(module, arguments, outputs):
        kept["outputs"] = outputs.proposals.boxes[0, 0], outputs.decoder.logits[-1, 0], outputs.decoder.boxes[-1, 0]

    network.register_forward_hook(keep)
    return kept


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"no photographs in {BCCD} (DINO_BCCD)")
def test_as_the_detector_of_detectron2(checkpoint):
    """On photographs, through Detectron2's own mapper; slots are compared whose selected token is the same."""
    network = model_from_checkpoint(checkpoint).network
    detector = DINODetector(network=network, criterion=default_criterion(), num_classes=3, max_detections=36).eval()
    mapper = TestMapper([ShortSide([PREPROCESSING.short_side], PREPROCESSING.max_size)])
    predictor = Predictor.from_checkpoint(checkpoint, device="cpu", score_thresh=0)
    theirs, ours = raw_outputs(detector.network), raw_outputs(predictor.network)
    slots = same = 0
    for path in list_images(BCCD / "images")[:8]:
        height, width = read_image(path).shape[:2]
        instances = detector([mapper({"file_name": str(path), "height": height, "width": width})])[0]["instances"]
        found = predictor(path)
        (proposals, logits, boxes), (our_proposals, our_logits, our_boxes) = theirs["outputs"], ours["outputs"]
        agree = (proposals - our_proposals).abs().amax(1) < 1e-4
        slots, same = slots + len(agree), same + int(agree.sum())
        assert (logits - our_logits)[agree].abs().max() < 1e-3
        assert (boxes - our_boxes)[agree].abs().max() < 1e-4
        assert len(instances) == len(found) == 36
        if agree.all():
            assert torch.allclose(instances.scores, found.scores, atol=1e-4)
    assert same >= 0.98 * slots
    print(f"{same} of {slots} slots have the same token")

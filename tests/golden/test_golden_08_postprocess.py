"""Detections from predictions against the official program."""

import pytest
import torchvision

from dino.layers import detections, xyxy_to_cxcywh

from .golden import GoldenFile

golden = GoldenFile("08")
CASES = golden.config["cases"]


def to_xywh(boxes):
    corner, size = boxes.clone(), boxes.clone()
    size[:, 2:] -= corner[:, :2]
    return size


@pytest.mark.parametrize("case", CASES)
def test_detections(case):
    """Other box formats and suppression are options of the official program; here they are applied afterwards."""
    settings = CASES[case]
    for image, size in enumerate(golden["target_sizes"].tolist()):
        found = detections(golden["pred_logits"][image], golden["pred_boxes"][image], tuple(size), settings["n"])
        if "nms" in settings:
            kept = torchvision.ops.nms(found.boxes, found.scores, settings["nms"])  # over all classes together
            found = type(found)(*(x[kept] for x in found))
        if settings.get("not_to_xyxy"):
            found = found._replace(boxes=xyxy_to_cxcywh(found.boxes))
        if settings.get("test"):
            found = found._replace(boxes=to_xywh(found.boxes))
        golden.check(f"{case}/scores{image}", found.scores)
        golden.check(f"{case}/labels{image}", found.labels)
        golden.check(f"{case}/boxes{image}", found.boxes)

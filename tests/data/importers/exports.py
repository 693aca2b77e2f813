"""Writes the same small data set as the annotation tools do."""

import json
from pathlib import Path
from xml.sax.saxutils import quoteattr

from ...coco_files import NAMES, write_coco

WIDTH, HEIGHT = 72, 64


def truth(folder, counts=(2, 0, 3, 1), seed=0):
    """Images in `folder`, and their content in COCO's format."""
    content = write_coco(Path(folder), counts=counts, seed=seed).read()
    Path(folder, "annotations.json").unlink()
    return content


def by_image(content):
    """(entry, its annotations), for each image."""
    return [(i, [a for a in content["annotations"] if a["image_id"] == i["id"]]) for i in content["images"]]


def name_of(a):
    return NAMES[a["category_id"] - 1]


def yolo(root, splits=("train", "valid")):
    """As Roboflow writes: data.yaml with paths that leave its folder."""
    contents = {}
    for seed, split in enumerate(splits):
        contents[split] = truth(root / split / "images", seed=seed)
        (root / split / "labels").mkdir()
        for image, objects in by_image(contents[split]):
            lines = []
            for a in objects:
                x, y, w, h = a["bbox"]
                box = [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT]
                lines.append(" ".join(map(str, [a["category_id"] - 1, *box])))
            if lines:
                (root / split / "labels" / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    paths = {"train": "../train/images", "valid": "../valid/images", "test": "../test/images"}
    lines = [f"{'val' if s == 'valid' else s}: {paths[s]}" for s in splits]
    (root / "data.yaml").write_text("\n".join([*lines, "nc: 3", f"names: {list(NAMES)}"]))
    return contents


def voc(root):
    content = truth(root / "JPEGImages")
    (root / "Annotations").mkdir()
    for image, objects in by_image(content):
        parts = []
        for a in objects:
            x, y, w, h = a["bbox"]
            corners = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
            parts.append(f"<object><name>{name_of(a)}</name><bndbox>{corners}</bndbox></object>")
        text = f"<annotation><filename>{image['file_name']}</filename>{''.join(parts)}</annotation>"
        (root / "Annotations" / image["file_name"]).with_suffix(".xml").write_text(text)
    return content


def cvat(root):
    content = truth(root / "images")
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    parts = []
    for image, objects in by_image(content):
        boxes = []
        for number, a in enumerate(objects):
            x, y, w, h = a["bbox"]
            points = f"{x}.00,{y}.00;{x + w}.00,{y}.00;{x + w}.00,{y + h}.00;{x}.00,{y + h}.00"
            box = f'xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}" z_order="0"'
            boxes.append(
                f'<polygon label="{name_of(a)}" occluded="0" points="{points}"></polygon>'
                if number % 2
                else f'<box label="{name_of(a)}" occluded="0" {box}></box>'
            )
        name = quoteattr(image["file_name"])
        parts.append(
            f'<image id="{image["id"]}" name={name} width="{WIDTH}" height="{HEIGHT}">{"".join(boxes)}</image>'
        )
    meta = f"<meta><job><labels>{labels}</labels></job></meta>"
    (root / "annotations.xml").write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>{meta}{"".join(parts)}</annotations>'
    )
    return content


def label_studio(root):
    content = truth(root / "images")
    tasks = []
    for image, objects in by_image(content):
        name = f"0a1b2c{image['id']:02x}-{image['file_name']}"
        (root / "images" / image["file_name"]).rename(root / "images" / name)
        results = []
        for a in objects:
            x, y, w, h = a["bbox"]
            value = {"x": 100 * x / WIDTH, "y": 100 * y / HEIGHT, "width": 100 * w / WIDTH, "height": 100 * h / HEIGHT}
            value |= {"rotation": 0, "rectanglelabels": [name_of(a)]}
            results.append(
                {"type": "rectanglelabels", "value": value, "original_width": WIDTH, "original_height": HEIGHT}
            )
        annotations = [{"was_cancelled": True, "result": []}, {"was_cancelled": False, "result": results}]
        tasks.append({"id": image["id"], "data": {"image": f"/data/upload/1/{name}"}, "annotations": annotations})
    (root / "export.json").write_text(json.dumps(tasks))
    return content


def labelme(root):
    content = truth(root)
    for image, objects in by_image(content):
        shapes = []
        for a in objects:
            x, y, w, h = a["bbox"]
            shapes.append(
                {"label": name_of(a), "shape_type": "rectangle", "points": [[x, y + h], [x + w, y]], "flags": {}}
            )
        entry = {"version": "5.4", "shapes": shapes, "imagePath": image["file_name"], "imageData": "aaaa"}
        (root / image["file_name"]).with_suffix(".json").write_text(json.dumps(entry))
    return content


def create_ml(root):
    content = truth(root)
    entries = []
    for image, objects in by_image(content):
        annotations = []
        for a in objects:
            x, y, w, h = a["bbox"]
            place = {"x": x + w / 2, "y": y + h / 2, "width": w, "height": h}
            annotations.append({"label": name_of(a), "coordinates": place})
        entries.append({"image": image["file_name"], "annotations": annotations})
    (root / "export.json").write_text(json.dumps(entries))
    return content


EXPORTS = {  # writer, and the source to import
    "voc": (voc, "."),
    "cvat": (cvat, "annotations.xml"),
    "label_studio": (label_studio, "export.json"),
    "labelme": (labelme, "."),
    "create_ml": (create_ml, "export.json"),
}

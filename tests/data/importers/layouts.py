"""Writes COCO-format test data as other programs would export it; layouts, keys and units are those of the programs."""

import json
import os
import shutil
from html import escape
from pathlib import Path


def entries(files):
    """(image, [(class name, x, y, w, h)]) of each image."""
    data = files.read()
    names = {c["id"]: c["name"] for c in data["categories"]}
    for image in data["images"]:
        objects = [(names[a["category_id"]], *a["bbox"]) for a in data["annotations"] if a["image_id"] == image["id"]]
        yield image, objects


def copy_images(files, folder, rename=lambda name: name):
    folder.mkdir(parents=True, exist_ok=True)
    for image, _ in entries(files):
        shutil.copy(Path(files.images, image["file_name"]), folder / rename(image["file_name"]))


def yolo_lines(image, objects, names):
    width, height = image["width"], image["height"]
    for name, x, y, w, h in objects:
        yield f"{names.index(name)} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"


def names_of(files):
    return [c["name"] for c in files.read()["categories"]]


def write_yolo_part(files, images, labels):
    copy_images(files, images)
    labels.mkdir(parents=True, exist_ok=True)
    for image, objects in entries(files):
        lines = "".join(yolo_lines(image, objects, names_of(files)))
        (labels / Path(image["file_name"]).with_suffix(".txt")).write_text(lines)


def write_roboflow_yolo(folder, train, val, test=None):
    """Roboflow's layout; its data.yaml leads out of the folder by mistake, which every reader forgives."""
    for name, files in (("train", train), ("valid", val), ("test", test)):
        if files:
            write_yolo_part(files, folder / name / "images", folder / name / "labels")
    names = names_of(train)
    (folder / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\n"
        f"nc: {len(names)}\nnames: {names}\n\n"
        "roboflow:\n  workspace: mine\n  project: shapes\n  version: 1\n  license: CC BY 4.0\n"
    )
    (folder / "README.roboflow.txt").write_text("shapes > 2026-01-01\n")
    return folder


def write_ultralytics(folder, train, val, path="../datasets/shapes"):
    for name, files in (("train", train), ("val", val)):
        write_yolo_part(files, folder / "images" / name, folder / "labels" / name)
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(names_of(train)))
    (folder / "shapes.yaml").write_text(
        f"path: {path} # dataset root dir\ntrain: images/train\nval: images/val\ntest: # optional\n\nnames:\n{names}"
    )
    return folder


def write_voc(folder, files, xml="Annotations", images="JPEGImages", database="Unknown"):
    copy_images(files, folder / images)
    (folder / xml).mkdir(parents=True, exist_ok=True)
    first = 1 if "VOC" in database else 0
    for image, objects in entries(files):
        size = "".join(f"<{key}>{image[key]}</{key}>" for key in ("width", "height"))
        parts = [
            f"<annotation>\n<folder>{images}</folder>\n<filename>{image['file_name']}</filename>\n"
            f"<path>C:\\Users\\me\\{image['file_name']}</path>\n<source><database>{database}</database></source>\n"
            f"<size>{size}<depth>3</depth></size>\n<segmented>0</segmented>\n"
        ]
        for name, x, y, w, h in objects:
            corners = {"xmin": x + first, "ymin": y + first, "xmax": x + w, "ymax": y + h}
            box = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
            parts.append(f"<object><name>{name}</name><difficult>0</difficult>\n<bndbox>{box}</bndbox></object>\n")
        path = folder / xml / Path(image["file_name"]).with_suffix(".xml")
        path.write_text("".join([*parts, "</annotation>\n"]))
    return folder


def write_labelme(folder, files):
    copy_images(files, folder)
    for image, objects in entries(files):
        shapes = [
            {
                "label": name,
                "points": [[float(x + w), float(y + h)], [float(x), float(y)]],  # drawn from the lower right
                "group_id": None,
                "description": "",
                "shape_type": "rectangle",
                "flags": {},
                "mask": None,
            }
            for name, x, y, w, h in objects
        ]
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"..\\photos\\{image['file_name']}",
            "imageData": "aGVsbG8=" * 1000,
            "imageHeight": image["height"],
            "imageWidth": image["width"],
        }
        (folder / Path(image["file_name"]).with_suffix(".json")).write_text(json.dumps(content, indent=2))
    return folder


def write_cvat(folder, files, subset=""):
    copy_images(files, folder / "images")
    labels = "".join(
        f"<label>\n<name>{name}</name>\n<color>#aabbcc</color>\n<type>any</type>\n<attributes>\n</attributes>\n</label>\n"
        for name in names_of(files)
    )
    parts = [
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta>\n<task>\n<id>7</id>\n'
        f"<name>a &amp; b</name>\n<labels>\n{labels}</labels>\n</task>\n<dumped>2026-01-01</dumped>\n</meta>\n"
    ]
    for number, (image, objects) in enumerate(entries(files)):
        size = f'width="{image["width"]}" height="{image["height"]}"'
        part = f' subset="{subset}"' if subset else ""
        parts.append(f'<image id="{number}" name="{escape(image["file_name"])}"{part} {size}>\n')
        for name, x, y, w, h in objects:
            corners = f'xtl="{x:.2f}" ytl="{y:.2f}" xbr="{x + w:.2f}" ybr="{y + h:.2f}"'
            parts.append(f'<box label="{name}" source="manual" occluded="0" {corners} z_order="0">\n</box>\n')
        parts.append("</image>\n")
    (folder / "annotations.xml").write_text("".join([*parts, "</annotations>\n"]))
    return folder


def label_studio_task(number, image, objects, address):
    result = [
        {
            "original_width": image["width"],
            "original_height": image["height"],
            "image_rotation": 0,
            "value": {
                "x": 100 * x / image["width"],
                "y": 100 * y / image["height"],
                "width": 100 * w / image["width"],
                "height": 100 * h / image["height"],
                "rotation": 0,
                "rectanglelabels": [name],
            },
            "id": f"r{index}",
            "from_name": "label",
            "to_name": "image",
            "type": "rectanglelabels",
            "origin": "manual",
        }
        for index, (name, x, y, w, h) in enumerate(objects)
    ]
    return {
        "id": number,
        "annotations": [{"id": number, "result": result, "was_cancelled": False, "ground_truth": False}],
        "file_upload": address.rpartition("/")[2],
        "predictions": [],
        "data": {"image": address},
        "meta": {},
        "total_annotations": 1,
        "project": 3,
    }


def write_label_studio(folder, files, address="/data/upload/3/0a1b2c3d-{}"):
    """The pictures keep the names that they had before the upload."""
    copy_images(files, folder / "pictures")
    tasks = [
        label_studio_task(number, image, objects, address.format(image["file_name"]))
        for number, (image, objects) in enumerate(entries(files), 11)
    ]
    path = folder / "project-3-at-2026-01-01-10-00-00000000.json"
    path.write_text(json.dumps(tasks))
    return path


def write_createml(folder, files):
    copy_images(files, folder)
    content = [
        {
            "image": image["file_name"],
            "annotations": [
                {"label": name, "coordinates": {"x": x + w / 2, "y": y + h / 2, "width": w, "height": h}}
                for name, x, y, w, h in objects
            ],
        }
        for image, objects in entries(files)
    ]
    path = folder / "_annotations.createml.json"
    path.write_text(json.dumps(content))
    return path


def contents(data):
    """{base name of a file: sorted (class name, box)} of a COCO-format file."""
    names = {c["id"]: c["name"] for c in data["categories"]}
    found = {i["id"]: (os.path.basename(i["file_name"]), []) for i in data["images"]}
    for a in data["annotations"]:
        found[a["image_id"]][1].append((names[a["category_id"]], a["bbox"]))
    return {name: sorted(objects) for name, objects in found.values()}

"""Files changed at random: refused with a message that names the file, or good for training, evaluation and report."""

import copy
import itertools
import json
import random
import time

import pytest

from dino.data.check import check_dataset, repair
from dino.data.check.issues import count_errors
from dino.data.check.object_sizes import Resize
from dino.data.coco import CocoImages, collate, read_annotations
from dino.evaluation import average_precision
from dino.evaluation.report.report import image_paths, write_report
from dino.utils.files import DataError

from ..coco_files import write_coco

SCALARS = [None, True, False, 0, 1, 2, -1, 3.0, 0.5, 1e-300, 1e300, 1e400, float("nan"), 10**30, -(10**400), 2**53 + 1]
TEXTS = [
    "",
    "0",
    "1",
    "2.0",
    "1e3",
    " 7 ",
    "-3",
    "nan",
    "inf",
    "none",
    "true",
    "x" * 300,
    "\ud800",
    "a\0b",
    "\x1b[2J",
    "é",
]
NAMES = [
    "image_1.png",
    "./image_2.png",
    "../image_1.png",
    "/etc/passwd",
    "images\\image_3.png",
    "IMAGE_4.PNG",
    "%2e%2e/x",
]
LISTS = [
    [],
    [1],
    [1, 2, 3],
    [1, 2, 3, 4],
    ["5", "6", "7", "8"],
    [5, 6, -7, 8],
    [0, 0, 0, 0],
    [None] * 4,
    [[]],
    {},
    {"id": 1},
]
OUTLINES = [
    [[1, 2, 30, 2, 30, 40]],
    [[1, 2, 3]],
    [1, 2, 30, 2, 30, 40],
    {"size": [64, 72], "counts": [10, 50, 4548]},
    {"size": [64, 72], "counts": "0" * 5},
    {"size": [0, 72], "counts": [0]},
    {"size": [2**40, 2**40], "counts": [2**80]},
    {"size": ["a"], "counts": {}},
    {"counts": "oooooo", "size": [64, 72]},
]
VALUES = [*SCALARS, *TEXTS, *NAMES, *LISTS, *OUTLINES]
KEYS = {
    "images": ["id", "file_name", "width", "height"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "score"],
    "categories": ["id", "name", "supercategory"],
}


def mutate(content, choose):
    """Change one thing of parsed annotations in place."""
    part = choose.choice([*KEYS, "annotations", "annotations"])
    entries = content.get(part)
    if not isinstance(entries, list) or not entries:
        return
    index = choose.randrange(len(entries))
    kind = choose.random()
    if kind < 0.03:
        content[part] = copy.deepcopy(choose.choice(VALUES))
    elif kind < 0.06:
        entries[index] = copy.deepcopy(choose.choice(VALUES))
    elif kind < 0.12:
        entries.append(copy.deepcopy(entries[index]))
    elif isinstance(entries[index], dict):
        change_entry(entries, index, choose.choice(KEYS[part]), choose)


def change_entry(entries, index, key, choose):
    """One key of an entry, or of all of them."""
    touched = entries if choose.random() < 0.2 else [entries[index]]
    value = choose.choice(VALUES)
    how = choose.random()
    for entry in touched:
        if not isinstance(entry, dict):
            continue
        if how < 0.15:
            entry.pop(key, None)
        elif how < 0.4 and key in entry:
            entry[key] = str(entry[key])
        elif how < 0.5 and isinstance(entry.get(key), list) and entry[key]:
            entry[key][choose.randrange(len(entry[key]))] = copy.deepcopy(value)
        else:
            entry[key] = copy.deepcopy(value)


def fuzzed(clean, seed):
    """A copy of parsed annotations with one to four changes."""
    choose, content = random.Random(seed), copy.deepcopy(clean)
    for _ in range(choose.randint(1, 4)):
        mutate(content, choose)
    return content


def unchanged(image, objects):
    return image, objects


def attempt(run):
    """What it returns, and the message of its DataError."""
    try:
        return run(), None
    except DataError as error:
        return None, str(error)


def use(files):
    """Train's, evaluation's and the report's view of a file that the reader accepts; how many objects it has."""
    data = CocoImages(*files, unchanged)
    targets, refusal = attempt(lambda: collate([data[index] for index in range(len(data))])[1])
    if refusal is None:
        assert sum(len(t.labels) for t in targets) == sum(map(len, data.objects.values()))
    else:
        assert str(files.images) in refusal  # the name of an image file
    results = [
        {"image_id": image["id"], "category_id": data.category_ids[0], "bbox": [3, 4, 20, 20], "score": 0.5}
        for image in data.images
    ]
    metrics = average_precision.evaluate(data.data, results)
    assert all(-1 <= value <= 1 for value in metrics.values())
    return data, results


def check_and_repair(files):
    """Like `dino check --fix`; whether a cleaned copy was written into the file."""
    checked = check_dataset.check_all([(files.path, files.folder)], Resize())[0]
    check_dataset.print_report([checked], 5)
    result, refusal = attempt(lambda: repair(checked.original, checked.data, checked.split.contents, checked.issues))
    if refusal is not None:
        assert "can't fix" in refusal
        return False
    lost = sum(n for kind, n in result.dropped.items() if kind not in ("object_twice", "shared"))
    assert lost == 0 or lost < 0.1 * result.total
    files.path.write_text(json.dumps(result.data))
    return True


class Files:
    """As `CocoFiles`, with paths."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "annotations.json"
        self.annotations, self.images = str(self.path), str(folder)

    def __iter__(self):
        return iter((self.annotations, self.images))


def fuzz(tmp_path, seeds, report_each=25):
    clean = write_coco(tmp_path, counts=(4, 3, 0, 3), category_ids=(1, 2, 3)).read()
    files, counts = Files(tmp_path), {"accepted": 0, "repaired": 0, "refused": 0}
    for seed in seeds:
        start = time.perf_counter()
        files.path.write_text(json.dumps(fuzzed(clean, seed)))
        used, refusal = attempt(lambda: use(files))
        if refusal is not None:
            assert str(files.path) in refusal, (seed, refusal)
            assert len(refusal) < 2000, seed
            counts["refused"] += 1
        else:
            counts["accepted"] += 1
            if counts["accepted"] % report_each == 1:
                data, results = used
                page = tmp_path / f"{seed}.html"
                paths = image_paths(data.data, files.images)
                write_report(page, data=data.data, results=results, files=paths, details={}, shown=2)
        fixed, refusal = attempt(lambda: check_and_repair(files))
        assert refusal is None or str(files.path) in refusal, (seed, refusal)
        if fixed:
            read_annotations(*files)
            again = check_dataset.check_all([(files.path, files.folder)], Resize())[0]
            assert not count_errors(again.issues), (seed, again.issues)
            counts["repaired"] += 1
        assert time.perf_counter() - start < 5, seed
    return counts


def test_fuzzed_annotations(tmp_path):
    counts = fuzz(tmp_path, range(150))
    assert min(counts.values()) > 20, counts


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1_000, 6_000, 500))
def test_many_fuzzed_annotations(tmp_path, first):
    fuzz(tmp_path, itertools.islice(itertools.count(first), 500))

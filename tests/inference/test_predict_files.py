import errno
import io
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from dino import cli
from dino.data.images import read_image
from dino.inference import predict_files
from dino.utils.run_folder import hold_folder

from ..coco_files import NAMES, write_coco
from ..tools.programs import ROOT, contents, run_verb
from .test_predictor import SMALL, picture, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "my model ü.pth"
    write_checkpoint(path)
    return path


@pytest.fixture
def dino(checkpoint, monkeypatch, tmp_path, capsys):
    """Runs the verb in an empty folder, in this process -> exit code, what was printed as an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict_files, "keep_freed_memory", lambda: None)  # it would last

    def run(*words):
        code = cli.main(["predict", str(checkpoint), *map(str, words), "--device", "cpu"])
        run.out, error = capsys.readouterr()
        return code, error

    return run


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_new_user(dino, checkpoint, tmp_path, tmp_path_factory):
    """In an empty folder, in a process of its own without Detectron2, with names of spaces and letters of any kind."""
    write_coco(tmp_path / "my photos 图")
    blocked = tmp_path_factory.mktemp("blocked")
    (blocked / "detectron2.py").write_text("raise ImportError('blocked')")
    words = ["my photos 图", "--score-thresh", "0"]
    path = os.pathsep.join(map(str, (blocked, ROOT)))
    result = run_verb("predict", checkpoint, *words, "--device", "cpu", folder=tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert "4 pictures with 40 objects written to output/predictions" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"my photos 图", "output"}
    names = {path.name for path in (tmp_path / "output/predictions").iterdir()}
    assert names == {"predictions.json", *(f"image_{n}.png" for n in range(1, 5))}
    assert dino(*words) == (0, "")
    assert (tmp_path / "output/predictions.1/image_1.png").exists()


def test_pictures_and_json(dino, tmp_path):
    write_coco(tmp_path / "images", width=96, height=80)
    Image.fromarray(picture()).save(tmp_path / "photo.JPG")
    Image.fromarray(picture()).save(tmp_path / "scan.bmp")
    assert dino("images", "*.JPG", "scan.bmp", "photo.JPG", "--output", "out", "--score-thresh", 0) == (0, "")
    drawn = {p.name for p in (tmp_path / "out").iterdir()}
    assert drawn == {"predictions.json", "photo.JPG", "scan.bmp.png", *(f"image_{n}.png" for n in range(1, 5))}
    with Image.open(tmp_path / "out/photo.JPG") as image:
        assert image.format == "JPEG"
    assert (read_image(tmp_path / "out/image_1.png") != read_image(tmp_path / "images/image_1.png")).any()
    coco = COCO(tmp_path / "out/predictions.json")
    assert [c["name"] for c in coco.loadCats([1, 2, 3])] == ["red", "green", "blue"]
    assert [i["file_name"] for i in coco.loadImgs(range(1, 7))][-2:] == ["photo.JPG", "scan.bmp"]
    assert (coco.imgs[1]["width"], coco.imgs[1]["height"]) == (96, 80)
    assert len(coco.anns) == 60
    x, _, w, h = coco.anns[1]["bbox"]
    assert -96 < x < 96
    assert coco.anns[1]["area"] == pytest.approx(w * h, abs=0.01)
    assert len(coco.loadRes(list(coco.anns.values())).anns) == 60


def test_one_program_at_a_time_writes_into_a_folder(dino, tmp_path):
    write_coco(tmp_path / "images")
    with hold_folder(tmp_path / "out"):
        code, error = dino("images", "--output", "out")
        assert (code, error.count("\n")) == (1, 1)
        assert error.startswith("error: out is in use by another process")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".dino.lock"]
    assert dino("images", "--output", "out") == (0, "")
    assert "predictions.json" in {path.name for path in (tmp_path / "out").iterdir()}
    assert not list((tmp_path / "out").glob(".*"))


def test_what_another_program_has_written_meanwhile_stays(dino, tmp_path, monkeypatch):
    """While this one loads its model."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    make = predict_files.make_predictor

    def slow(*words, **options):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/predictions.json").write_text("theirs")
        return make(*words, **options)

    monkeypatch.setattr(predict_files, "make_predictor", slow)
    code, error = dino("a.png", "--output", "out")
    assert (code, error) == (1, "error: out/predictions.json is taken. Choose another --output\n")
    assert contents(tmp_path / "out") == {Path("predictions.json"): b"theirs"}


def test_unfinished_files_of_other_programs_stay(dino, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    for name in ("a.png.part", "predictions.json.part"):
        (tmp_path / "out" / name).write_text("theirs")
    assert dino("a.png", "--output", "out") == (0, "")
    written = contents(tmp_path / "out")
    assert {path.name for path in written} == {"a.png", "predictions.json", "a.png.part", "predictions.json.part"}
    assert [content for path, content in written.items() if path.suffix == ".part"] == [b"theirs"] * 2


def test_the_longest_names(dino, tmp_path):
    names = [f"{'j' * 248}.jpg", f"{'b' * 248}.bmp", f"{'é' * 124}.png"]
    for name in names:
        Image.fromarray(picture()).save(tmp_path / name)
    assert dino(*names, "--output", "out") == (0, "")
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert drawn == {names[0], f"{'b' * 248}.png", names[2], "predictions.json"}


def test_names_do_no_harm_to_a_terminal(dino, tmp_path):
    pages = [Image.fromarray(picture(seed=number)) for number in range(2)]
    pages[0].save(tmp_path / "a\x1b[2J.gif", save_all=True, append_images=pages[1:])
    for name in ("b\x1b[31m.png", "c\x1b[31m.png"):
        (tmp_path / name).write_text("broken")
    code, error = dino(".", "--output", "out")
    assert code == 1
    assert "\x1b" not in dino.out + error
    assert "was used: a\\x1b[2J.gif" in dino.out
    assert dino.out.count("not read: ") == 2


def test_options(dino, tmp_path):
    Image.fromarray(picture(200, 300)).save(tmp_path / "a.png")
    words = ["--tile", 128, "--overlap", 0.1, "--nms", 0.5, "--one-label", "--batch-size", 2, "--dtype", "bf16"]
    assert dino("a.png", "--max-detections", 4, "--score-thresh", 0, "--output", "out", *words) == (0, "")
    assert len(read_json(tmp_path / "out/predictions.json")["annotations"]) == 4


def test_nothing_is_overwritten(dino, tmp_path):
    write_coco(tmp_path / "images")
    (tmp_path / "twice").mkdir()
    for name in ("scan.bmp", "scan.bmp.png"):
        Image.fromarray(picture()).save(tmp_path / "twice" / name)
    before = contents(tmp_path)
    for words, expected, message in (
        (["images", "--output", "images"], 1, "image_1.png is taken. Choose another --output"),
        (["images", "twice/scan.bmp", "twice/scan.bmp.png", "--output", "out"], 1, "out/scan.bmp.png is taken"),
        (["absent.jpg"], 2, "input not found: absent.jpg"),
        (["absent/*.jpg"], 1, "no images match absent/*.jpg"),
        (["absent.mp4"], 2, "input not found: absent.mp4"),
        (["images", "--tile", "3"], 1, "tile must be in"),
    ):
        code, error = dino(*words)
        assert code == expected
        assert message in error
        assert error.count("\n") == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out/predictions.json").write_text("mine")
    assert "predictions.json is taken" in dino("images", "--output", "out")[1]
    (tmp_path / "out/predictions.json").unlink()
    assert contents(tmp_path) == before


def test_bad_checkpoints(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict_files, "keep_freed_memory", lambda: None)  # it would last
    write_coco(tmp_path / "images")
    (tmp_path / "model.pth").write_bytes(b"")
    for name, code in (("model.pth", 1), ("absent.pth", 2), ("images", 2)):
        assert cli.main(["predict", name, "images"]) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert name in error
        assert error.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_bad_images_are_left_out_and_told(dino, tmp_path):
    write_coco(tmp_path / "images")
    (tmp_path / "images/image_2.png").write_bytes(b"no image")
    (tmp_path / "images/image_3.png").write_bytes(b"")
    (tmp_path / "images/image_9.png").write_bytes(huge_png())
    code, error = dino("images", "--output", "out")
    assert code == 1
    assert error.startswith("error: can't read image images/image_2.png")
    assert "3 of 5 inputs could not be read" in error
    listed = [line for line in dino.out.splitlines() if line.startswith("not read: can't read image")]
    assert ["image_2.png" in listed[0], "image_3.png" in listed[1], "image_9.png" in listed[2]] == [True] * 3
    assert error.count("\n") == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"predictions.json", "image_1.png", "image_4.png"}
    listed = [image["file_name"] for image in read_json(tmp_path / "out/predictions.json")["images"]]
    assert listed == ["image_1.png", "image_4.png"]


def test_equal_names_keep_their_folders(dino, tmp_path):
    for folder in ("a", "b/deep", "c"):
        write_coco(tmp_path / folder)
    (tmp_path / "c/image_4.png").rename(tmp_path / "c/other.png")
    (tmp_path / "c/image_1.png").rename(tmp_path / "image_1.png")
    words = ["a", "./a/image_1.png", "**/image_*.png", "c", "--output", "out"]
    assert dino(*words) == (0, "")
    drawn = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    equal = {f"{folder}/image_{n}.png" for folder in ("a", "b/deep", "c") for n in (1, 2, 3)} - {"c/image_1.png"}
    assert drawn == equal | {"a/image_4.png", "b/deep/image_4.png", "image_1.png", "other.png"}
    assert {image["file_name"] for image in read_json(tmp_path / "out/predictions.json")["images"]} == drawn


def test_a_folder_of_everything(dino, clip, tmp_path):
    folder = tmp_path / "camera"
    folder.mkdir()
    pages = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    for name in ("scan.tif", "cartoon.gif", "phone.mpo"):
        pages[0].save(folder / name, save_all=True, append_images=pages[1:])
    for name in ("._scan.tif", ".hidden.jpg", "notes.txt"):
        (folder / name).write_bytes(b"no picture")
    pages[0].save(folder / "plain.jfif", format="JPEG")
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    assert dino("camera", "--output", "out") == (0, "")
    names = {"scan.tif.png", "cartoon.gif.png", "phone.mpo.png", "plain.jfif.png", "clip.mp4", "clip.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"predictions.json"}
    assert "only the first page of 2 files was used: cartoon.gif, scan.tif\n" in dino.out


def test_the_limit_of_pixels_is_a_flag(dino, tmp_path, monkeypatch):
    Image.fromarray(picture(60, 70)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    code, error = dino("a.png", "--output", "out")
    assert code == 1
    assert "can't read image a.png" in error
    assert "--max-pixels N" in error
    assert dino("a.png", "--output", "more", "--max-pixels", 4200) == (0, "")
    assert "max_pixels must be in [1" in dino("a.png", "--output", "third", "--max-pixels", 0)[1]


def test_the_range_of_a_checkpoint(dino, tmp_path):
    """The rule that images were trained with holds for those that are predicted."""
    write_checkpoint(tmp_path / "deep.pth", preprocessing=SMALL._replace(input_range=(0.0, 4080.0)))
    eight = picture()[:, :, 0]
    predictor = predict_files.make_predictor(tmp_path / "deep.pth", device="cpu", score_thresh=0)
    expected = predictor(eight)
    for name, dtype in (("a.png", np.uint16), ("a.tif", np.float32)):
        Image.fromarray(eight.astype(dtype) * 16).save(tmp_path / name)
        found = predictor(tmp_path / name)
        assert (found.boxes == expected.boxes).all()
        assert found.draw().size == (100, 72)
    code, error = dino("a.tif", "--output", "out")
    assert code == 1
    assert "can't read image a.tif: its mode F has no range of its own: floats" in error


def huge_png():
    """A file that says that it is 40,000 pixels wide and high."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC])
def test_refused_writes(dino, tmp_path, monkeypatch, code):
    """At the third picture: the two before it stay, and the JSON holds these."""
    write_coco(tmp_path / "images")
    write, calls = Path.write_bytes, []

    def fail(path, content):
        calls.append(path)
        if len(calls) == 3:
            write(path, b"half a pict")
            raise OSError(code, os.strerror(code))
        write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    status, error = dino("images", "--output", "out")
    assert status == 1
    assert error == f"error: can't write out/image_3.png: [Errno {code}] {os.strerror(code)}\n"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"predictions.json", "image_1.png", "image_2.png"}
    assert len(read_json(tmp_path / "out/predictions.json")["images"]) == 2


def test_the_first_error_is_shown_where_all_fail(dino, tmp_path, monkeypatch):
    """On a full disk, the JSON can't be finished either."""
    write_coco(tmp_path / "images")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    status, error = dino("images", "--output", "out")
    assert status == 1
    assert error == "error: can't write out/image_1.png: [Errno 28] No space left on device\n"
    assert not (tmp_path / "out").exists()


def test_a_jpeg_on_a_full_disk_leaves_no_stump(dino, tmp_path):
    noise = Image.frombytes("RGB", (96, 64), np.random.default_rng(0).bytes(96 * 64 * 3))
    noise.save(tmp_path / "a.jpg", quality=92)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        status, error = dino("a.jpg", "--output", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, error) == (1, "error: can't write out/a.jpg: [Errno 27] File too large\n")
    assert not list((tmp_path / "out").glob("*.jpg*"))


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_at_the_end(dino, tmp_path, monkeypatch, name):
    """When the JSON is finished: it is not there, and no half of it."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    function = getattr(os, name)
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # the first is that of the picture
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        function(*arguments)

    monkeypatch.setattr(os, name, fail)
    status, error = dino("a.png", "--output", "out")
    assert status == 1
    assert error == "error: can't write out/predictions.json: [Errno 28] No space left on device\n"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


def test_a_folder_that_is_none(dino, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("mine")
    status, error = dino("a.png", "--output", "file/out")
    assert status == 1
    assert "can't make the folder file/out" in error
    assert (tmp_path / "file").read_text() == "mine"


def test_predictions_go_back_in(tmp_path, capsys, monkeypatch):
    """With the ids of the data set, and through `dino eval`; a file from before has the ids 1, 2, 3."""
    monkeypatch.setattr(predict_files, "keep_freed_memory", lambda: None)
    files = write_coco(tmp_path / "data", category_ids=(7, 42, 900))
    write_checkpoint(tmp_path / "model.pth", category_ids=[7, 42, 900])
    write_checkpoint(tmp_path / "old.pth")
    metrics = []
    for name, ids in (("model", [7, 42, 900]), ("old", [1, 2, 3])):
        torch.manual_seed(0)
        words = [tmp_path / f"{name}.pth", files.images, "--output", tmp_path / name, "--score-thresh", 0]
        assert cli.main(["predict", *map(str, words), "--device", "cpu"]) == 0
        content = read_json(tmp_path / name / "predictions.json")
        assert content["categories"] == [{"id": k, "name": n} for k, n in zip(ids, NAMES, strict=True)]
        assert {a["category_id"] for a in content["annotations"]} <= set(ids)
        data = ["--val-json", files.annotations, "--val-images", files.images, "--output", tmp_path / f"{name}_report"]
        words = ["eval", "--results", tmp_path / name / "predictions.json", *data, "--shown", 0]
        assert cli.main([*map(str, words)]) == 0, capsys.readouterr().err
        metrics.append(read_json(tmp_path / f"{name}_report/metrics.json"))
    assert metrics[0]["AP50"] >= 0

    # True boxes in the form of predictions have an AP of 1, whatever their ids are.
    truth = files.read()
    for number, category in enumerate(truth["categories"]):
        category["id"] = number
    for annotation in truth["annotations"]:
        annotation.update(category_id=[7, 42, 900].index(annotation["category_id"]), score=0.9)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    data = ["--val-json", files.annotations, "--val-images", files.images, "--output", str(tmp_path / "truth")]
    assert cli.main(["eval", "--results", str(tmp_path / "truth.json"), *data, "--shown", "0"]) == 0
    assert read_json(tmp_path / "truth/metrics.json")["AP50"] == 1


@pytest.fixture
def clip(tmp_path):
    """Ten frames of 97 x 64 pixels at 10 frames per second."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    from dino.inference.video import VideoWriter

    path = tmp_path / "my clip ü.mp4"
    writer = VideoWriter(path, 10, (64, 97))
    for number in range(10):
        writer.write(np.full((64, 97, 3), 20 * number, np.uint8))
    writer.close()
    return path


def frames_of(path):
    from dino.inference.video import VideoReader

    video = VideoReader(path)
    return video.fps, np.stack(list(video))


def test_video(dino, clip, tmp_path):
    assert dino(clip.name, "--output", "out", "--score-thresh", 0, "--batch-size", 4) == (0, "")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {clip.name, "my clip ü.json"}
    fps, frames = frames_of(tmp_path / "out" / clip.name)
    assert fps == 10
    assert frames.shape == (10, 64, 96, 3)
    assert np.abs(frames[-1].astype(int) - 180).max() > 60  # something is drawn
    content = read_json(tmp_path / "out/my clip ü.json")
    assert [image["frame"] for image in content["images"]] == list(range(10))
    assert content["images"][3]["file_name"] == f"{clip.name}#3"  # as pictures: the name of the file
    assert {image["video"] for image in content["images"]} == {clip.name}
    assert len(content["annotations"]) == 100


def test_bad_videos(dino, clip, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:500])
    (tmp_path / "empty.avi").write_bytes(b"")
    code, error = dino("broken.mp4", clip.name, "empty.avi", "--output", "out")
    assert code == 1
    assert error.startswith("error: can't read broken.mp4: no video")
    assert "2 of 3 inputs" in error
    assert error.count("\n") == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {clip.name, "my clip ü.json"}


def test_a_full_disk_under_a_video(clip, tmp_path):
    """OpenCV says nothing when it can't write; the limit makes the kernel refuse what goes beyond it."""
    from dino.inference.video import VideoWriter
    from dino.utils.files import DataError

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = VideoWriter(tmp_path / "full.mp4", 10, (64, 96))
    import signal

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        for number in range(40):
            writer.write(picture(64, 96, seed=number))
        with pytest.raises(DataError, match=r"can't write .*full\.mp4: \d+ of 40 frames arrived. Is the disk full"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert {p.name for p in tmp_path.iterdir()} == {clip.name}


class Camera:
    """Stands for a webcam, whose user presses Ctrl-C at the fourth frame."""

    def __init__(self, source):
        assert source == 7
        self.frames = 0

    def isOpened(self):
        return True

    def get(self, what):
        return -1.0

    def read(self):
        self.frames += 1
        if self.frames == 4:
            raise KeyboardInterrupt
        return True, picture(64, 96)

    def release(self):
        pass


def test_a_webcam(dino, monkeypatch, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    original = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: (Camera if isinstance(source, int) else original)(source))
    assert dino(7, "--output", "out") == (0, "")
    assert len(read_json(tmp_path / "out/webcam_7.json")["images"]) == 3
    fps, frames = frames_of(tmp_path / "out/webcam_7.mp4")
    assert fps == 25
    assert len(frames) >= 3


def test_a_missing_webcam(dino, tmp_path):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    code, error = dino(97, "--output", "out")
    assert code == 1
    assert error.startswith("error: can't read webcam 97: ")


def test_ctrl_c_keeps_the_frames_before_it(dino, clip, monkeypatch, tmp_path):
    add = predict_files._CocoWriter.add

    def stop(self, found, **facts):
        add(self, found, **facts)
        if self.images == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(predict_files._CocoWriter, "add", stop)
    code, error = dino(clip.name, "--output", "out")
    assert (code, error) == (130, "error: interrupted\n")
    assert len(read_json(tmp_path / "out/my clip ü.json")["images"]) == 5
    assert len(frames_of(tmp_path / "out" / clip.name)[1]) == 5


def test_the_example(dino, capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    out = capsys.readouterr().out
    assert "dino predict model_final.pth photo.jpg" in out
    assert "dino predict model_final.pth 0 " in out

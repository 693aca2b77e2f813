"""Published weights by name: where each file is, whose it is, which recipe it fits, and what the file does not say."""

from __future__ import annotations

from pathlib import PurePath
from typing import NamedTuple

from .coco_classes import COCO_IDS, RAW_COCO_CLASSES

_DETREX_FILES = "https://github.com/IDEA-Research/detrex-storage/releases/download/"
_DETREX_PAGE = "https://github.com/IDEA-Research/detrex/tree/main/projects/dino"
_OFFICIAL_PAGE = "https://drive.google.com/drive/folders/1qD5m1NmK0kjE5hh-G17XUX751WsEG-h_"
_MMDETECTION_PAGE = "https://github.com/open-mmlab/mmdetection/tree/main/configs/dino"
_BY_HAND = "_official"  # end of the names of files without a plain download


class Published(NamedTuple):
    """A published file of weights, trained on COCO."""

    name: str  # what people write instead of a file
    recipe: str  # whose network it fits; its classes may differ
    address: str  # of a plain download, or ""
    page: str  # for people: where the file is linked or lies
    file: str  # its name
    owner: str
    ap: float  # published box AP on COCO val2017, percent
    format: str  # official, detrex or mmdetection
    temperature: float  # of the position encoding that it was trained with
    offset: float  # of the same
    megabytes: int  # 10^6 bytes of its tensors: what the file has at least
    note: str = ""  # other differences to the recipe
    size: int | None = None  # bytes, where published: nowhere yet
    sha256: str = ""  # all digits or the first ones, where published
    licence: str = "Apache-2.0"  # of all these repositories; none states another one for its weights

    @property
    def shared_heads(self) -> bool:
        """Whether all decoder layers have the same pair of heads."""
        return self.format == "official"

    @property
    def num_classes(self) -> int:
        """80, or 91 for labels that are COCO's raw ids."""
        return RAW_COCO_CLASSES if self.format == "official" else len(COCO_IDS)


class NotRead(NamedTuple):
    """A published file of weights whose backbone this project does not have, trained on COCO."""

    name: str  # what a file with this backbone would be called here
    backbone: str
    address: str
    page: str
    owner: str
    ap: float  # published box AP on COCO val2017, percent
    note: str

    @property
    def reason(self) -> str:
        """Why it is not read, and which program runs it."""
        return f"this project has no {self.backbone} backbone; {self.owner} has: {self.page}"


def _of_detrex(
    recipe: str, ending: str, file: str, ap: float, megabytes: int, note: str = "", *, position=(10000.0, -0.5)
) -> Published:
    """An entry of detrex' table, named by its recipe and an ending; `file` begins with the release."""
    temperature, offset = position
    return Published(
        name=recipe + ending,
        recipe=recipe,
        address=_DETREX_FILES + file,
        page=_DETREX_PAGE,
        file=file.rpartition("/")[2],
        owner="detrex",
        ap=ap,
        format="detrex",
        temperature=temperature,
        offset=offset,
        megabytes=megabytes,
        note=note,
    )


def _of_official(recipe: str, file: str, ap: float, megabytes: int, recorded: str = "") -> Published:
    """An entry of the official program's table; `file` lies in its Drive folder. `recorded`: a hash from elsewhere."""
    return Published(
        name=recipe + _BY_HAND,
        recipe=recipe,
        address="",
        page=_OFFICIAL_PAGE,
        file=file,
        owner="IDEA-Research/DINO",
        ap=ap,
        format="official",
        temperature=20.0,
        offset=0.0,
        megabytes=megabytes,
        note=f"LibreYOLO's documentation records the SHA-256 {recorded}" if recorded else "",
    )


def _of_mmdetection(recipe: str, address: str, ap: float, megabytes: int, *, position=(20.0, 0.0)) -> Published:
    """An entry of mmdetection's table; the names of its files end with digits of their SHA-256."""
    temperature, offset = position
    return Published(
        name=recipe + "_mmdetection",
        recipe=recipe,
        address=address,
        page=_MMDETECTION_PAGE,
        file=address.rpartition("/")[2],
        sha256=PurePath(address).stem.rpartition("-")[2],
        owner="mmdetection",
        ap=ap,
        format="mmdetection",
        temperature=temperature,
        offset=offset,
        megabytes=megabytes,
    )


_TRAINER = "trained by detrex' projects/dino/train_net.py: rate 2e-4, a tenth for backbone and sampling offsets"
_TUNED = f"{_TRAINER}; nothing of the backbone frozen, class loss weight 2"
_22K_SWIN = "backbone from ImageNet-22k weights fine-tuned on ImageNet-1k"
_UNPADDED = "detrex does not pad images to multiples of 32 pixels"
_FOCALNET = "backbone from ImageNet-22k weights; detrex pads images to multiples of 4 pixels"
_1K, _22K = (f"backbone from ImageNet-{weights} weights; {_UNPADDED}" for weights in ("1k", "22k fine-tuned on 1k"))

_MMDETECTION_FILES = "https://download.openmmlab.com/mmdetection/v3.0/dino/"

# The position encoding of each detrex file is that of its configuration (projects/dino/configs at commit e244e6c): the
# value of models/dino_r50.py since its first version, which only dino_r50_4scale_24ep.py replaces. The official README
# says how its files are named; the names are those that other programs' conversion scripts read. mmdetection's entries
# are those of its README and metafile, their position encodings those of its configurations.
_ENTRIES = (
    _of_detrex("dino_r50_4scale_12ep", "", "v0.2.0/dino_r50_4scale_12ep_49_2AP.pth", 49.2, 191),
    _of_detrex(
        "dino_r50_4scale_12ep",
        "_ema",
        "v0.3.0/dino_r50_4scale_12ep_with_ema.pth",
        49.4,
        191,
        "the running average of the weights (EMA) has the AP",
    ),
    _of_detrex(
        "dino_r50_4scale_12ep",
        "_300dn",
        "v0.2.0/dino_r50_4scale_12ep_300dn.pth",
        49.5,
        191,
        "trained with 300 denoising queries",
    ),
    _of_detrex(
        "dino_r50_4scale_12ep",
        "_hacked_trainer",
        "v0.4.0/dino_r50_4scale_12ep_hacked_trainer.pth",
        49.4,
        191,
        _TRAINER,
    ),
    _of_detrex(
        "dino_r50_4scale_12ep_tuned",
        "",
        "v0.4.0/dino_r50_4scale_12ep_backbone_2e-5_class_weight_2.0.pth",
        49.8,
        191,
        _TUNED,
    ),
    _of_detrex(
        "dino_r50_4scale_12ep_tuned_300dn",
        "",
        "v0.4.0/dino_r50_4scale_12ep_backbone_2e-5_class_weight_2.0_300dn.pth",
        50.0,
        191,
        f"{_TUNED}, 300 denoising queries",
    ),
    _of_detrex("dino_r50_4scale_24ep", "", "v0.1.1/dino_r50_4scale_24ep.pth", 50.6, 191, position=(20.0, 0.0)),
    _of_detrex("dino_r50_5scale_12ep", "", "v0.2.1/dino_r50_5scale_12ep.pth", 49.6, 192),
    _of_detrex("dino_r101_4scale_12ep", "", "v0.1.1/dino_r101_4scale_12ep.pth", 50.0, 267),
    *(
        _of_detrex(f"dino_swin_{recipe}", ending, f"{file}.pth", ap, megabytes, note)
        for recipe, ending, file, ap, megabytes, note in (
            ("t_224_4scale_12ep", "", "v0.1.1/dino_swin_tiny_224_4scale_12ep", 51.3, 193, ""),
            (
                "t_224_4scale_12ep",
                "_in22k",
                "v0.1.1/dino_swin_tiny_224_22kto1k_finetune_4scale_12ep",
                52.5,
                193,
                _22K_SWIN,
            ),
            ("s_224_4scale_12ep", "", "v0.1.1/dino_swin_small_224_4scale_12ep", 53.0, 278, ""),
            ("s_224_4scale_12ep", "_in22k", "v0.4.0/dino_swin_small_22k_4scale_12ep", 54.5, 278, _22K_SWIN),
            ("b_384_4scale_12ep", "", "v0.1.1/dino_swin_base_384_4scale_12ep", 55.8, 437, _22K_SWIN),
            ("l_224_4scale_12ep", "", "v0.1.1/dino_swin_large_224_4scale_12ep", 56.9, 872, _22K_SWIN),
            ("l_384_4scale_12ep", "", "v0.1.1/dino_swin_large_4scale_12ep", 56.9, 876, _22K_SWIN),
            ("l_384_5scale_12ep", "", "v0.2.1/dino_swin_large_384_5scale_12ep", 57.5, 877, _22K_SWIN),
            ("l_384_4scale_36ep", "", "v0.2.0/dino_swin_large_384_4scale_36ep", 58.1, 876, _22K_SWIN),
            ("l_384_5scale_36ep", "", "v0.2.1/dino_swin_large_384_5scale_36ep", 58.5, 877, _22K_SWIN),
        )
    ),
    *(
        _of_detrex(f"dino_focalnet_l_{recipe}", "", f"{file}.pth", ap, megabytes, _FOCALNET)
        for recipe, file, ap, megabytes in (
            ("fl3_4scale_12ep", "v0.2.1/dino_focal_large_lrf_384_4scale_12ep", 57.5, 913),
            ("fl3_4scale_36ep", "v0.4.0/dino_focal_large_3level_4scale_36ep", 58.3, 913),
            ("fl4_4scale_12ep", "v0.2.1/dino_focal_large_lrf_384_fl4_4scale_12ep", 58.0, 914),
            ("fl4_5scale_12ep", "v0.2.1/dino_focalnet_large_lrf_384_fl4_5scale_12ep", 58.5, 916),
        )
    ),
    *(
        _of_detrex(f"dino_vitdet_{recipe}", "", f"v0.2.1/dino_vitdet_{file}.pth", ap, megabytes, _UNPADDED)
        for recipe, file, ap, megabytes in (
            ("b_4scale_12ep", "4scale_12ep", 50.2, 433),
            ("b_4scale_50ep", "base_4scale_50ep", 55.0, 433),
            ("l_4scale_12ep", "large_4scale_12ep", 52.9, 1307),
            ("l_4scale_50ep", "large_4scale_50ep", 57.5, 1307),
        )
    ),
    *(
        _of_detrex(
            f"dino_convnext_{size}_4scale_12ep", ending, f"v0.4.0/dino_convnext_{file}_4scale_12ep.pth", ap, mb, note
        )
        for size, ending, file, ap, mb, note in (
            ("t", "", "tiny_1k", 51.4, 194, _1K),
            ("t", "_in22k", "tiny_384", 52.4, 194, _22K),
            ("s", "", "small_1k", 52.0, 280, _1K),
            ("s", "_in22k", "small_384", 54.2, 280, _22K),
            ("b", "", "base_1k", 52.6, 436, _1K),
            ("b", "_in22k", "base_384", 55.1, 436, _22K),
            ("l", "", "large_1k", 53.4, 876, _1K),
            ("l", "_in22k", "large_384", 55.5, 876, _22K),
        )
    ),
    _of_mmdetection(
        "dino_r50_4scale_12ep",
        f"{_MMDETECTION_FILES}dino-4scale_r50_8xb2-12e_coco/dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth",
        49.0,
        191,
    ),
    _of_mmdetection(
        "dino_r50_4scale_12ep_tuned_300dn",
        f"{_MMDETECTION_FILES}dino-4scale_r50_improved_8xb2-12e_coco/"
        "dino-4scale_r50_improved_8xb2-12e_coco_20230818_162607-6f47a913.pth",
        50.1,
        191,
        position=(10000.0, -0.5),
    ),
    _of_mmdetection(
        "dino_swin_l_384_5scale_12ep",
        f"{_MMDETECTION_FILES}dino-5scale_swin-l_8xb2-12e_coco/"
        "dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth",
        57.2,
        877,
    ),
    _of_mmdetection(
        "dino_swin_l_384_5scale_36ep",
        "https://github.com/RistoranteRist/mmlab-weights/releases/download/dino-swinl/"
        "dino-5scale_swin-l_8xb2-36e_coco-5486e051.pth",
        58.4,
        877,
    ),
    _of_official(
        "dino_r50_4scale_12ep",
        "checkpoint0011_4scale.pth",
        49.0,
        188,
        "0bcd6b0c33d60ed33461ce6f02ce5797a819c7c02eb7e15b76adfb6df307955a",
    ),
    _of_official("dino_r50_4scale_24ep", "checkpoint0023_4scale.pth", 50.4, 188),
    _of_official("dino_r50_4scale_36ep", "checkpoint0033_4scale.pth", 50.9, 188),
    _of_official(
        "dino_r50_5scale_12ep",
        "checkpoint0011_5scale.pth",
        49.4,
        189,
        "1ccc1b6b7139813e4d3bfbeecfcf88347ebc226829769a0bf16c4a114c275cc0",
    ),
    _of_official("dino_r50_5scale_24ep", "checkpoint0022_5scale.pth", 51.3, 189),
    _of_official("dino_r50_5scale_36ep", "checkpoint0031_5scale.pth", 51.2, 189),
    _of_official("dino_swin_l_384_4scale_12ep", "checkpoint0011_4scale_swin.pth", 56.8, 873),
    _of_official("dino_swin_l_384_5scale_12ep", "checkpoint0011_5scale_swin.pth", 57.3, 874),
    _of_official("dino_swin_l_384_4scale_36ep", "checkpoint0029_4scale_swin.pth", 58.0, 873),
    _of_official(
        "dino_swin_l_384_5scale_36ep",
        "checkpoint0027_5scale_swin.pth",
        58.5,
        874,
        "17ddce1592816a0c63a2edc94d4a0877ffeb086f397a6657e151c703a4c850b5",
    ),
    Published(
        name="dino_r50_4scale_12ep_align_detr" + _BY_HAND,
        recipe="dino_r50_4scale_12ep_align_detr",
        address="",
        page="https://drive.google.com/file/d/12xSxD_Z9KI8bejSlO1td1XcZ-Ns00rTi/view",
        file="aligndetr_k=2_r50_4scale_12ep.pth",
        owner="Align-DETR",
        ap=50.3,
        format="detrex",
        temperature=10000.0,
        offset=-0.5,
        megabytes=191,
        note="the page holds this file alone; it may have another name there",
    ),
)
PUBLISHED: dict[str, Published] = {entry.name: entry for entry in _ENTRIES}

NOT_READ: dict[str, NotRead] = {
    name: NotRead(name, backbone, address, _DETREX_PAGE, "detrex", ap, f"{note}, 12 epochs, 4 scales")
    for name, backbone, address, ap, note in (
        *(
            (
                f"dino_internimage_{size[0]}_4scale_12ep",
                f"InternImage-{size.title()}",
                f"{_DETREX_FILES}v0.4.0/dino_internimage_{size}_4scale_12ep.pth",
                ap,
                f"backbone from ImageNet-{weights} weights",
            )
            for size, ap, weights in (
                ("tiny", 52.3, "1k"),
                ("small", 53.6, "1k"),
                ("base", 54.7, "1k"),
                ("large", 57.0, "22k"),
            )
        ),
        (
            "dino_eva_01_4scale_12ep",
            "EVA-01",
            "https://huggingface.co/IDEA-CVR/DINO-EVA/resolve/main/"
            "dino_eva_01_o365_finetune_detr_like_augmentation_4scale_12ep.pth",
            59.1,
            "backbone from Objects365 weights",
        ),
    )
}


def find(name: str) -> Published | None:
    """The entry of a name; of a recipe whose only published file has to be fetched by hand, that file's."""
    return PUBLISHED.get(name) or PUBLISHED.get(name + _BY_HAND)


def find_file(path: str | PurePath) -> Published | None:
    """The entry of a downloaded file, by the file's name alone. Compare its format before you use the constants."""
    name = PurePath(path).name
    return next((entry for entry in PUBLISHED.values() if entry.file == name), None)


def find_source(source: str | PurePath) -> Published | None:
    """The entry of a name or of a downloaded file, see `find` and `find_file`."""
    return find(str(source)) or find_file(source)

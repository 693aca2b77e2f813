"""Published weights by name: where each file is, whose it is, which recipe it fits, and what the file does not say."""

from __future__ import annotations

from pathlib import PurePath
from typing import NamedTuple

_DETREX_FILES = "https://github.com/IDEA-Research/detrex-storage/releases/download/"
_DETREX_PAGE = "https://github.com/IDEA-Research/detrex/tree/main/projects/dino"
_OFFICIAL_PAGE = "https://drive.google.com/drive/folders/1qD5m1NmK0kjE5hh-G17XUX751WsEG-h_"
_LICENCE = "Apache-2.0"  # of both repositories; neither states another one for its weights
_BY_HAND = "_official"  # end of the names of files without a plain download


class Published(NamedTuple):
    """A published file of weights, trained on COCO."""

    name: str  # what people write instead of a file
    recipe: str  # whose network it fits; its classes may differ
    address: str  # of a plain download, or ""
    page: str  # for people: where the file is linked or lies
    file: str  # its name
    size: int | None  # bytes, where published
    sha256: str  # all digits or the first ones, where published, or ""
    owner: str
    licence: str
    ap: float  # published box AP on COCO val2017, percent
    format: str  # official or detrex
    temperature: float  # of the position encoding that it was trained with
    offset: float  # of the same
    shared_heads: bool  # whether all decoder layers have the same pair of heads
    num_classes: int  # 80, or 91 for labels that are COCO's raw ids
    note: str = ""  # other differences to the recipe


def _of_detrex(name: str, recipe: str, file: str, ap: float, note: str = "", *, position=(10000.0, -0.5)) -> Published:
    """An entry of detrex' table; `file` begins with the release."""
    temperature, offset = position
    return Published(
        name=name,
        recipe=recipe,
        address=_DETREX_FILES + file,
        page=_DETREX_PAGE,
        file=file.rpartition("/")[2],
        size=None,
        sha256="",
        owner="detrex",
        licence=_LICENCE,
        ap=ap,
        format="detrex",
        temperature=temperature,
        offset=offset,
        shared_heads=False,
        num_classes=80,
        note=note,
    )


def _of_official(recipe: str, file: str, ap: float, sha256: str = "") -> Published:
    """An entry of the official program's table; `file` lies in its Drive folder."""
    return Published(
        name=recipe + _BY_HAND,
        recipe=recipe,
        address="",
        page=_OFFICIAL_PAGE,
        file=file,
        size=None,
        sha256=sha256,
        owner="IDEA-Research/DINO",
        licence=_LICENCE,
        ap=ap,
        format="official",
        temperature=20.0,
        offset=0.0,
        shared_heads=True,
        num_classes=91,
    )


_TRAINER = "trained by detrex' projects/dino/train_net.py: rate 2e-4, a tenth for backbone and sampling offsets"
_TUNED = f"{_TRAINER}; nothing of the backbone frozen, class loss weight 2"
_22K_SWIN = "backbone from ImageNet-22k weights fine-tuned on ImageNet-1k"
_UNPADDED = "there images are not padded to multiples of 32 pixels"
_FOCALNET = "backbone from ImageNet-22k weights; there images are padded to multiples of 4 pixels"

# The position encoding of each detrex file is that of its configuration (projects/dino/configs at commit e244e6c): the
# value of models/dino_r50.py since its first version, which only dino_r50_4scale_24ep.py replaces. Hashes of official
# files are those that LibreYOLO's documentation of its port states for its downloads; names of the files are those that
# its and other programs' conversion scripts read.
_ENTRIES = (
    _of_detrex("dino_r50_4scale_12ep", "dino_r50_4scale_12ep", "v0.2.0/dino_r50_4scale_12ep_49_2AP.pth", 49.2),
    _of_detrex(
        "dino_r50_4scale_12ep_ema",
        "dino_r50_4scale_12ep",
        "v0.3.0/dino_r50_4scale_12ep_with_ema.pth",
        49.4,
        "the running average of the weights (EMA) has the AP",
    ),
    _of_detrex(
        "dino_r50_4scale_12ep_300dn",
        "dino_r50_4scale_12ep",
        "v0.2.0/dino_r50_4scale_12ep_300dn.pth",
        49.5,
        "trained with 300 denoising queries",
    ),
    _of_detrex(
        "dino_r50_4scale_12ep_hacked_trainer",
        "dino_r50_4scale_12ep",
        "v0.4.0/dino_r50_4scale_12ep_hacked_trainer.pth",
        49.4,
        _TRAINER,
    ),
    _of_detrex(
        "dino_r50_4scale_12ep_tuned",
        "dino_r50_4scale_12ep_tuned",
        "v0.4.0/dino_r50_4scale_12ep_backbone_2e-5_class_weight_2.0.pth",
        49.8,
        _TUNED,
    ),
    _of_detrex(
        "dino_r50_4scale_12ep_tuned_300dn",
        "dino_r50_4scale_12ep_tuned_300dn",
        "v0.4.0/dino_r50_4scale_12ep_backbone_2e-5_class_weight_2.0_300dn.pth",
        50.0,
        f"{_TUNED}, 300 denoising queries",
    ),
    _of_detrex(
        "dino_r50_4scale_24ep",
        "dino_r50_4scale_24ep",
        "v0.1.1/dino_r50_4scale_24ep.pth",
        50.6,
        position=(20.0, 0.0),
    ),
    _of_detrex("dino_r50_5scale_12ep", "dino_r50_5scale_12ep", "v0.2.1/dino_r50_5scale_12ep.pth", 49.6),
    _of_detrex("dino_r101_4scale_12ep", "dino_r101_4scale_12ep", "v0.1.1/dino_r101_4scale_12ep.pth", 50.0),
    *(
        _of_detrex(recipe + ending, recipe, file, ap, note)
        for recipe, ending, file, ap, note in (
            ("dino_swin_t_224_4scale_12ep", "", "v0.1.1/dino_swin_tiny_224_4scale_12ep.pth", 51.3, ""),
            (
                "dino_swin_t_224_4scale_12ep",
                "_in22k",
                "v0.1.1/dino_swin_tiny_224_22kto1k_finetune_4scale_12ep.pth",
                52.5,
                _22K_SWIN,
            ),
            ("dino_swin_s_224_4scale_12ep", "", "v0.1.1/dino_swin_small_224_4scale_12ep.pth", 53.0, ""),
            ("dino_swin_s_224_4scale_12ep", "_in22k", "v0.4.0/dino_swin_small_22k_4scale_12ep.pth", 54.5, _22K_SWIN),
            ("dino_swin_b_384_4scale_12ep", "", "v0.1.1/dino_swin_base_384_4scale_12ep.pth", 55.8, _22K_SWIN),
            ("dino_swin_l_224_4scale_12ep", "", "v0.1.1/dino_swin_large_224_4scale_12ep.pth", 56.9, _22K_SWIN),
            ("dino_swin_l_384_4scale_12ep", "", "v0.1.1/dino_swin_large_4scale_12ep.pth", 56.9, _22K_SWIN),
            ("dino_swin_l_384_5scale_12ep", "", "v0.2.1/dino_swin_large_384_5scale_12ep.pth", 57.5, _22K_SWIN),
            ("dino_swin_l_384_4scale_36ep", "", "v0.2.0/dino_swin_large_384_4scale_36ep.pth", 58.1, _22K_SWIN),
            ("dino_swin_l_384_5scale_36ep", "", "v0.2.1/dino_swin_large_384_5scale_36ep.pth", 58.5, _22K_SWIN),
            ("dino_focalnet_l_fl3_4scale_12ep", "", "v0.2.1/dino_focal_large_lrf_384_4scale_12ep.pth", 57.5, _FOCALNET),
            ("dino_focalnet_l_fl3_4scale_36ep", "", "v0.4.0/dino_focal_large_3level_4scale_36ep.pth", 58.3, _FOCALNET),
            (
                "dino_focalnet_l_fl4_4scale_12ep",
                "",
                "v0.2.1/dino_focal_large_lrf_384_fl4_4scale_12ep.pth",
                58.0,
                _FOCALNET,
            ),
            (
                "dino_focalnet_l_fl4_5scale_12ep",
                "",
                "v0.2.1/dino_focalnet_large_lrf_384_fl4_5scale_12ep.pth",
                58.5,
                _FOCALNET,
            ),
            ("dino_vitdet_b_4scale_12ep", "", "v0.2.1/dino_vitdet_4scale_12ep.pth", 50.2, _UNPADDED),
            ("dino_vitdet_b_4scale_50ep", "", "v0.2.1/dino_vitdet_base_4scale_50ep.pth", 55.0, _UNPADDED),
            ("dino_vitdet_l_4scale_12ep", "", "v0.2.1/dino_vitdet_large_4scale_12ep.pth", 52.9, _UNPADDED),
            ("dino_vitdet_l_4scale_50ep", "", "v0.2.1/dino_vitdet_large_4scale_50ep.pth", 57.5, _UNPADDED),
        )
    ),
    *(
        _of_detrex(
            f"dino_convnext_{letter}_4scale_12ep{ending}",
            f"dino_convnext_{letter}_4scale_12ep",
            f"v0.4.0/dino_convnext_{word}_{weights}_4scale_12ep.pth",
            ap,
            note,
        )
        for letter, word, plain, more in (
            ("t", "tiny", 51.4, 52.4),
            ("s", "small", 52.0, 54.2),
            ("b", "base", 52.6, 55.1),
            ("l", "large", 53.4, 55.5),
        )
        for ending, weights, ap, note in (
            ("", "1k", plain, f"backbone from ImageNet-1k weights; {_UNPADDED}"),
            ("_in22k", "384", more, f"backbone from ImageNet-22k weights of 384 pixels; {_UNPADDED}"),
        )
    ),
    _of_official(
        "dino_r50_4scale_12ep",
        "checkpoint0011_4scale.pth",
        49.0,
        "0bcd6b0c33d60ed33461ce6f02ce5797a819c7c02eb7e15b76adfb6df307955a",
    ),
    _of_official("dino_r50_4scale_24ep", "checkpoint0023_4scale.pth", 50.4),
    _of_official("dino_r50_4scale_36ep", "checkpoint0033_4scale.pth", 50.9),
    _of_official(
        "dino_r50_5scale_12ep",
        "checkpoint0011_5scale.pth",
        49.4,
        "1ccc1b6b7139813e4d3bfbeecfcf88347ebc226829769a0bf16c4a114c275cc0",
    ),
    _of_official("dino_r50_5scale_24ep", "checkpoint0022_5scale.pth", 51.3),
    _of_official("dino_r50_5scale_36ep", "checkpoint0031_5scale.pth", 51.2),
    _of_official("dino_swin_l_384_4scale_12ep", "checkpoint0011_4scale_swin.pth", 56.8),
    _of_official("dino_swin_l_384_5scale_12ep", "checkpoint0011_5scale_swin.pth", 57.3),
    _of_official("dino_swin_l_384_4scale_36ep", "checkpoint0029_4scale_swin.pth", 58.0),
    _of_official(
        "dino_swin_l_384_5scale_36ep",
        "checkpoint0027_5scale_swin.pth",
        58.5,
        "17ddce1592816a0c63a2edc94d4a0877ffeb086f397a6657e151c703a4c850b5",
    ),
)
PUBLISHED: dict[str, Published] = {entry.name: entry for entry in _ENTRIES}


def find(name: str) -> Published | None:
    """The entry of a name; of a recipe whose only published file has to be fetched by hand, that file's."""
    return PUBLISHED.get(name) or PUBLISHED.get(name + _BY_HAND)


def find_file(path: str | PurePath) -> Published | None:
    """The entry of a downloaded file, by the file's name alone. Compare its format before you use the constants."""
    name = PurePath(path).name
    return next((entry for entry in PUBLISHED.values() if entry.file == name), None)

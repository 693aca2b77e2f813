"""What became of the tensors of a file and of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

PARTS = ("neck.backbone", "neck", "level_embed", "encoder", "query_selection", "denoising", "decoder")


@dataclass
class Report:
    """The result of `load_weights`; `str(report)` is a table.

    Args:
        source: the file, or "state dict".
        form: own, official, detrex, huggingface, or "backbone" for a file without a detector.
        loaded: names of the tensors that were taken.
        reinitialised: {name: reason} of those that stay as the model was built, because the file's have another size.
        missing: names of those that stay as the model was built, because the file has none.
        unexpected: what the file has and the model has not, by own names as far as they are known.
        notes: sentences for people.
    """

    source: str
    form: str
    loaded: list[str] = field(default_factory=list)
    reinitialised: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What keeps the model from being the one in the file: re-initialised and missing tensors."""
        return [f"{name} ({why})" for name, why in self.reinitialised.items()] + self.missing

    def __str__(self) -> str:
        columns = {
            "loaded": self.loaded,
            "re-initialised": list(self.reinitialised),
            "missing": self.missing,
            "unexpected": self.unexpected,
        }
        counts = {title: [part_of(name) for name in names] for title, names in columns.items()}
        parts = [part for part in (*PARTS, "other") if any(part in found for found in counts.values())]
        rows = [["", *columns]]
        rows += [[part, *(found.count(part) for found in counts.values())] for part in parts]
        rows += [["all", *map(len, columns.values())]]
        lines = [f"{self.source} (form: {self.form})"]
        lines += ["  {:<16}{:>8}{:>16}{:>9}{:>12}".format(*row) for row in rows]
        lines += [f"  {what}: {shorten(names)}" for what, names in self.named().items() if names]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def named(self) -> dict[str, list[str]]:
        """The names of all that was not loaded, by what became of them."""
        reasons = sorted(set(self.reinitialised.values()))
        named = {f"re-initialised, {r}": [n for n, why in self.reinitialised.items() if why == r] for r in reasons}
        return {**named, "missing": self.missing, "unexpected": self.unexpected}


def part_of(name: str) -> str:
    """The row of the table for a tensor."""
    return next((part for part in PARTS if name == part or name.startswith(f"{part}.")), "other")


def shorten(names: list[str], most: int = 6) -> str:
    """The first names of a list, and how many there are more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

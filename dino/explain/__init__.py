"""What a DINO does with one batch, recorded by hooks and drawn: `dino explain`."""

from .record import Record, Samples, record

__all__ = ["Record", "Samples", "record"]

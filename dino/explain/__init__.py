"""Pictures of one batch inside a DINO: recorded by hooks, then drawn (`dino explain`)."""

from .record import Record, Samples, record

__all__ = ["Record", "Samples", "record"]

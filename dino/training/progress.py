"""Rules that tell why a training goes wrong: values in, one line out. Both engines call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dino.utils.files import counted

_TINY = 8  # pixels, below which few detectors find anything
_WHOLE = 0.9  # share of the image, above which a box hardly places anything
_FEW = 200  # iterations, too few for an AP from random weights
_NO_AP = 0.001  # of AP and AP50
_WINDOW = 0.05  # of the training, over which a loss is averaged
_FALLEN = 0.9  # of the first loss


class Objects(NamedTuple):
    """The objects of both data sets, as far as they can explain a low AP.

    Args:
        sizes: (N,) square roots of the areas of training objects after the evaluation's resize, in pixels.
        shares: (N,) areas of training objects, as shares of their image in [0, 1].
        train, val: number of objects of each class, by its name.
        scores: number of training annotations with a score: predictions, as pseudo labels or by mistake.
    """

    sizes: np.ndarray
    shares: np.ndarray
    train: Counter[str]
    val: Counter[str]
    scores: int = 0

    def doubts(self) -> list[str]:
        """What looks wrong, a line each."""
        found = [self._tiny(), self._whole_image(), self._never_trained(), self._scored()]
        return [line for line in found if line]

    def _tiny(self) -> str:
        if not len(self.sizes) or np.median(self.sizes) >= _TINY:
            return ""
        return f"half of the objects are smaller than {_TINY} pixels: try larger images or tiles"

    def _whole_image(self) -> str:
        if not len(self.shares) or np.median(self.shares) <= _WHOLE:
            return ""
        return f"half of the training boxes cover more than {_WHOLE:.0%} of their image: are they boxes of objects?"

    def _never_trained(self) -> str:
        unseen = {name: count for name, count in self.val.items() if count and not self.train[name]}
        if 2 * sum(unseen.values()) <= self.val.total():
            return ""
        return (
            f"{sum(unseen.values())} of {self.val.total()} validation objects are of classes that no training object "
            f"has: {', '.join(list(unseen)[:10])}"
        )

    def _scored(self) -> str:
        if not self.scores:
            return ""
        number = counted(self.scores, "training annotation has a score", "training annotations have a score")
        return f"{number}, as predictions have: scores are ignored, each box counts as an object"


class Progress(NamedTuple):
    """A training so far.

    Args:
        length: of the training, in iterations.
        losses: total loss of each logged iteration; grows while the training runs.
        setting, lr: name of the learning rate's setting, and its value.
        doubts: what looks wrong in the data, see `Objects.doubts`.
    """

    length: int
    losses: dict[int, float]
    setting: str
    lr: float
    doubts: Sequence[str] = ()

    def rising_loss(self, completed: int) -> str | None:
        """The warning of a loss that is higher after the first third of the training than at its start.

        Args:
            completed: iterations.
        """
        if completed != max(self.length // 3, 1):
            return None
        first, now = self._first_and_last()
        if not now > first:
            return None
        return (
            f"the total loss rises: {first:.3g} at the start, {now:.3g} after {completed} of {self.length} iterations. "
            f"The learning rate {self.setting}={self.lr:.3g} is probably too high"
        )

    def zero_ap(self, completed: int, ap: float, ap50: float) -> str | None:
        """The warning of an AP of 0 after a third of the training or later; None also where AP is undefined.

        Args:
            completed: iterations.
            ap, ap50: in [0, 1]; NaN or negative where undefined.
        """
        if 3 * completed < self.length or not (0 <= ap < _NO_AP and 0 <= ap50 < _NO_AP):
            return None
        short = [f"{self.length} iterations are few"] if self.length < _FEW else []
        causes = [
            *self.doubts,
            *short,
            self._about_loss(),
            "boxes or classes that do not fit the images (see `dino check`)",
        ]
        return f"AP and AP50 are 0 after {completed} of {self.length} iterations. Likely causes: {'; '.join(causes)}"

    def _about_loss(self) -> str:
        """How the loss has changed, as a cause."""
        first, now = self._first_and_last()
        rate = f"{self.setting}={self.lr:.3g}"
        if np.isnan(first):
            return f"{rate} may not fit"
        if now <= _FALLEN * first:
            return f"the total loss fell from {first:.3g} to {now:.3g}, so the training may be too short"
        change = f"{first:.3g} at the start, {now:.3g} now"
        if now < first:
            return f"the total loss has hardly fallen ({change}), so {rate} may not fit, or the training is too short"
        return f"the total loss has not fallen ({change}), so {rate} may be too high"

    def _first_and_last(self) -> tuple[float, float]:
        """Median losses of the first and the last iterations; NaN where the first ones are not known."""
        width = max(_WINDOW * self.length, 1)
        early = [loss for iteration, loss in self.losses.items() if iteration < min(self.losses) + width]
        late = [loss for iteration, loss in self.losses.items() if iteration > max(self.losses) - width]
        if not early or min(self.losses) + width > max(self.losses):
            return float("nan"), float("nan")
        return float(np.median(early)), float(np.median(late))

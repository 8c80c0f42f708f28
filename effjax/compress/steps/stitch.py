"""A network between two trained ones: its first layers are those of one, its last those of the other.

`Stitch` makes one of two runs. Its map starts by least squares on calibration batches, and is trained on by
`recover`, taught by the large network, or by its own config. `Member` takes one out of a family that was
trained together (`effjax.train.tasks.stitching`). See `effjax.compress.stitching`.
"""

import dataclasses

import numpy as np

from effjax.compress.stitching import Pair, as_stitch, fitted, streams
from effjax.compress.structure.cost import macs
from effjax.compress.subject import Calibration, Subject
from effjax.errors import UsageError
from effjax.train.tasks.stitching import Stitching


@dataclasses.dataclass(frozen=True)
class Stitch:
    """Takes the first layers from a smaller network.

    Attributes:
      small: folder of its run.
      at: how many of its layers come first.
      to: how many of the first layers of the network itself are left out.
      batches: of training data that the map is fitted on.
      ridge: what is added to the squares, times their mean, so that few tokens fit it too.
    """

    small: str
    at: int
    to: int
    batches: int = 4
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if self.at < 1 or self.to < 0 or self.batches < 1:
            raise UsageError(
                f"at={self.at} and batches={self.batches} are at least 1, to={self.to} at least 0."
            )

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Stitches.

        Raises:
          UsageError: for networks that cannot be stitched, or layers that they do not have.
        """
        if calibration.open is None:
            raise UsageError("there is no folder to open here: stitch through experiments.compress.")
        small, large = calibration.open(self.small), subject
        pair = Pair.of(small, large)
        pair.path(self.at, self.to)  # refuses before anything is measured
        batches = calibration.first(self.batches)
        x, z = streams(small, batches)[self.at], streams(large, batches)[self.to]
        kernel, bias = fitted(x, z, self.ridge)
        made = pair.path(self.at, self.to, as_stitch(kernel, bias))
        left = np.sum((x @ kernel + bias - z) ** 2) / np.sum((z - z.mean(0)) ** 2)
        depth = large.model.depth
        calibration.report(
            f"{self.at} of {small.model.depth} layers, then {depth - self.to} of {depth}: "
            f"{macs(made) / macs(large):.4f} of the MACs; the map leaves {left:.4g} of the variance."
        )
        return made


@dataclasses.dataclass(frozen=True)
class Member:
    """Leaves one network of a family that was trained together.

    Attributes:
      at: how many layers of the small network come first; 0 leaves the large one alone.
      to: how many of the first layers of the large one are left out; None leaves the small one alone.
    """

    at: int
    to: int | None

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Takes it out.

        Raises:
          UsageError: for a run that trained no family, or a path that is not of it.
        """
        if not isinstance(subject.task, Stitching):
            raise UsageError(
                f"a member is of a family, task.kind='stitching', and this run's task is "
                f"{type(subject.task).__name__}: stitch two networks by kind='stitch'."
            )
        made = subject.task.member(subject.variables, subject.example, (self.at, self.to))
        calibration.report(f"path {self.at}, {self.to}: {macs(made)} MACs.")
        return made

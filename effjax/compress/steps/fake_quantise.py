"""Into training through rounding, and out of it: see `effjax.compress.storage.fake`."""

import dataclasses
from typing import Any

import jax

from effjax.compress.steps.inputs import with_inputs
from effjax.compress.storage.fake import Fake, FakeQuantised
from effjax.compress.storage.inputs import Range
from effjax.compress.storage.matrices import flat
from effjax.compress.storage.trees import replaced, stored_in, with_beside
from effjax.compress.subject import Calibration, Subject, chosen, leaf_at
from effjax.errors import UsageError
from effjax.layers.stored import RANGES


@dataclasses.dataclass(frozen=True)
class FakeQuantise:
    """Puts kernels on their grids for training.

    Attributes:
      layout: the grids, and how training follows what enters.
      kernels: regexps of whole paths.
      leave: regexps of kernels that stay arrays, whatever `kernels` says.
    """

    layout: Fake = dataclasses.field(default_factory=Fake)
    kernels: tuple[str, ...] = (".*",)
    leave: tuple[str, ...] = ()

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Wraps, and puts ranges beside the parameters.

        Raises:
          UsageError: for a pattern that matches no kernel, or a group that does not divide one.
        """
        made = {}
        for path, place in chosen(subject, self.kernels, self.leave).items():
            self.layout.groups(place.matrix[0], path)
            made[path] = self.layout.store(leaf_at(subject.params, path), place)
        params = replaced(subject.params, made)
        calibration.report(f"{len(made)} kernels lie on grids and can be trained on.")
        return dataclasses.replace(subject, variables=with_beside({**subject.variables, "params": params}))


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Turns kernels that were trained through rounding into codes, and their ranges into grids of inputs."""

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Rounds for good.

        Raises:
          UsageError: where no kernel is to be frozen, or the range of one was never followed.
        """
        made: dict[str, Any] = {}
        for path, kernel in stored_in(subject.params).items():
            if not isinstance(kernel, FakeQuantised):
                continue
            layout, place = kernel.layout, kernel.place
            codes = jax.jit(layout.weights.encode, static_argnums=1)(flat(kernel.kernel, place), place)
            known = _at(subject.variables.get(RANGES, {}), path)
            if layout.inputs is not None and known is not None:
                if not bool((known["steps"] > 0).all()):
                    raise UsageError(
                        f"nothing ever entered {path} in training: train the run with its ranges first, or "
                        f"leave this kernel out of 'fake_quantise'."
                    )
                codes = with_inputs(codes, layout.inputs, Range(known["low"], known["high"]))
            made[path] = codes
        if not made:
            raise UsageError("no kernel was trained through rounding: 'fake_quantise' is the step before.")
        calibration.report(f"{len(made)} kernels frozen.")
        rest = {name: value for name, value in subject.variables.items() if name != RANGES}
        return dataclasses.replace(subject, variables={**rest, "params": replaced(subject.params, made)})


def _at(ranges: Any, path: str) -> Any:
    """What was followed for a kernel, or None."""
    for name in path.split("/"):
        if name not in ranges:
            return None
        ranges = ranges[name]
    return ranges

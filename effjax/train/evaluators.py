"""What is measured while training, each kind a frozen dataclass of the config."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from effjax.data import Data, OpenData
from effjax.parallel.sharding import to_global
from effjax.train.tasks.mean import Means, add, values


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The task's own metrics, averaged over every example of a data set once.

    Attributes:
      data: what to evaluate on.
      every: how often, a duration such as `"1 epochs"`.
      ema: whether to use the averaged weights.
    """

    data: Data
    every: str
    ema: bool = False

    def run(
        self, program: Any, data: OpenData, variables: Any, check_stop: Callable[[], None]
    ) -> dict[str, float]:
        """Returns the averages as floats.

        Args:
          program: the compiled side of the run, `effjax.train.program.Program`.
          data: `self.data`, open.
          variables: parameters and collections on device.
          check_stop: called between batches; raises where the run was told to stop.
        """
        total: Means | None = None
        for batch in data.evaluate(process_index=jax.process_index(), process_count=jax.process_count()):
            check_stop()
            means = program.metrics(variables, to_global(batch, program.batch_sharding))
            total = means if total is None else _add(total, means)
        if total is None:
            return {}
        return program.task.finish({name: float(value) for name, value in values(total).items()})


_add = jax.jit(add)

KINDS = {"metrics": Metrics}

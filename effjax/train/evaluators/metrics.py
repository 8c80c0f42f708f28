"""The task's own metrics, and of text the bits a byte.

    bits a byte = sum of all bits / bytes of all documents

Tokens of one tokenizer are longer than those of another, so that losses a token cannot be compared, nor with
what a compressor makes of the same text; bits a byte can. Gao et al., "The Pile", 2020, section 3.1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from effjax.data import Data, OpenData
from effjax.parallel.pace import Pace
from effjax.train.evaluators.evaluation import Evaluation, ReadWeights, batches
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

    def open(self, read: ReadWeights) -> Evaluation:
        """The evaluator with its data open."""
        return _Open(self.data.open())


@dataclasses.dataclass(frozen=True)
class _Open:
    data: OpenData

    def __call__(self, program: Any, variables: Any, check_stop: Callable[[], None]) -> dict[str, float]:
        total: Means | None = None
        pace = Pace()
        for batch in batches(self.data, program, check_stop):
            means = program.metrics(variables, batch)
            total = means if total is None else _add(total, means)
            pace(total)
        if total is None:
            return {}
        finished: dict[str, float] = program.task.finish(
            {name: float(value) for name, value in values(total).items()}
        )
        size = self.data.bytes_per_token
        if size is not None and "bits_per_token" in finished:
            finished["bits_per_byte"] = finished["bits_per_token"] / size
        return finished


_add = jax.jit(add)

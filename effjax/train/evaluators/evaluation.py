"""What an open evaluator is."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax

from effjax.data import OpenData
from effjax.parallel.sharding import readers, to_global

# (folder, shapes of the variables, what they belong to) -> variables on the host
ReadWeights = Callable[[str, Any, str], Any]


@runtime_checkable
class Evaluation(Protocol):
    """An evaluator with its data open."""

    @property
    def data(self) -> OpenData:
        """What it evaluates on."""

    def __call__(self, program: Any, variables: Any, check_stop: Callable[[], None]) -> dict[str, float]:
        """What it measures, as floats.

        Args:
          program: the compiled side of the run, `effjax.train.program.Program`.
          variables: parameters and collections on device.
          check_stop: called between batches; raises where the run was told to stop.
        """


def batches(data: OpenData, program: Any, check_stop: Callable[[], None]) -> Iterator[dict[str, jax.Array]]:
    """Every example once, in order, laid out on the devices of the run."""
    for batch in data.evaluate(**readers(program.batch_sharding)):
        check_stop()
        yield to_global(batch, program.batch_sharding)

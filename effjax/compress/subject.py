"""What a recipe works on: a trained network on its way to a smaller one, and the data it is calibrated on."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Key

from effjax.compress.storage.trees import stored_in
from effjax.errors import UsageError
from effjax.layers.stored import Place, kernels
from effjax.matching import match

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A definition with its variables.

    Attributes:
      task: what the network was trained to do; holds its definition.
      variables: unboxed, by collection; kernels may be stored otherwise.
      example: a batch of one, for shapes.
    """

    task: Any
    variables: Mapping[str, Any]
    example: Batch

    @property
    def model(self) -> Any:
        """The definition."""
        return self.task.model

    @property
    def params(self) -> Any:
        """The parameters."""
        return self.variables["params"]

    def places(self) -> dict[str, Place]:
        """The kernels of the definition by path."""
        return kernels(self.boxed())

    def with_params(self, params: Any) -> "Subject":
        """The same definition with other parameters."""
        return dataclasses.replace(self, variables={**self.variables, "params": params})

    def with_model(self, model: Any, variables: Mapping[str, Any]) -> "Subject":
        """Another definition, and its variables, for the same task."""
        task = dataclasses.replace(self.task, model=model)
        return dataclasses.replace(self, task=task, variables=variables)

    def boxed(self) -> Any:
        """Shapes of the definition's parameters in their boxes."""
        return jax.eval_shape(lambda: self.task.init(jax.random.key(0), self.example)["params"])


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a step may look at, and whom it tells.

    Attributes:
      batches: opens the training data anew: batches as the run was trained on, `task.prepare` not yet done.
      key: of everything random.
      report: is told, in a sentence, how far a step is.
      original: the network before the first step, where a step may ask it.
      open: another run by its folder, as a network for the same data; None where there are no folders.
    """

    batches: Callable[[], Iterable[Batch]]
    key: Key[Array, ""]
    report: Callable[[str], None] = print
    original: Subject | None = None
    open: Callable[[str], Subject] | None = None

    def first(self, count: int) -> list[Batch]:
        """The first batches.

        Raises:
          UsageError: where the data has none.
        """
        found = [batch for batch, _ in zip(self.batches(), range(count), strict=False)]
        if not found:
            raise UsageError("the run's training data holds no batch to calibrate on.")
        return found


def chosen(
    subject: Subject, patterns: tuple[str, ...], leave: tuple[str, ...] = (), where: str = "kernels"
) -> dict[str, Place]:
    """The kernels that are still arrays, and whose path matches one of the patterns and none of `leave`.

    Raises:
      UsageError: for a pattern that matches no kernel, or where nothing is left.
    """
    places, stored = subject.places(), stored_in(subject.params)
    tree: dict[str, Any] = dict.fromkeys(places, 0)
    wanted = match([(pattern, True) for pattern in patterns], tree, default=False, where=where)
    left = match([(pattern, True) for pattern in leave], tree, default=False, where="leave")
    found = {
        path: place
        for path, place in places.items()
        if wanted[path] and not left[path] and path not in stored
    }
    if not found:
        raise UsageError(
            f"{where}={patterns} leaves no kernel to store: an earlier step took them, or `leave` does. The "
            f"kernels are {', '.join(list(places)[:6])}."
        )
    return found


def leaf_at(params: Any, path: str) -> Any:
    """What stands at a path."""
    for name in path.split("/"):
        params = params[name]
    return params

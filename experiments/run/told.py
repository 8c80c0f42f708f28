"""What the pictures of a request are told: classes, or what held-out examples show."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from effjax.errors import UsageError
from effjax.train.program import Program

ROWS = 10  # where nobody says how many


def held_out(
    program: Program, number: int
) -> tuple[Shaped[np.ndarray, "n *shape"], Shaped[np.ndarray, "n *rest"]]:
    """The first examples that a diffusion run is evaluated on, and what it is told of each.

    Args:
      program: of the run.
      number: of examples; where the data has fewer, all.

    Raises:
      UsageError: for a run without evaluation data.
    """
    evaluators = program.experiment.evaluators
    if not evaluators:
        raise UsageError("held-out examples were asked for, and the run has no evaluation data.")
    task = program.task
    content: list[Any] = []
    told: list[Any] = []
    for batch in next(iter(evaluators.values())).data.open().evaluate():
        real = np.asarray(batch["mask"]) > 0
        content.extend(np.asarray(batch[task.content])[real])
        told.extend(np.asarray(task.told(batch))[real])
        if len(content) >= number:
            break
    return np.stack(content[:number]), np.stack(told[:number])


def conditions(
    program: Program, classes: Sequence[int] | None, examples: Sequence[int] | None
) -> Shaped[np.ndarray, "rows *rest"]:
    """What each row is told.

    Args:
      program: of a diffusion run.
      classes: by number; None means the first ten, of a model that knows classes.
      examples: numbers of held-out examples, whose conditions are taken instead. A model that is told
        something else than classes takes those of the first ten where nobody says which.

    Raises:
      UsageError: for classes of a model that knows none, or examples that do not exist.
    """
    model = program.task.model
    known: int = getattr(model, "classes", 0)
    if classes is not None and not known:
        raise UsageError(
            f"--classes: {type(model).__name__} is told no classes. Name held-out examples whose "
            f"{program.task.condition} it shall be told, as in --examples=0,1,2."
        )
    if examples is None and known:
        return np.asarray(range(min(known, ROWS)) if classes is None else classes, np.int32)
    asked = range(ROWS) if examples is None else examples
    _, told = held_out(program, max(asked) + 1)
    if examples is None:
        asked = range(len(told))
    for number in asked:
        if not 0 <= number < len(told):
            raise UsageError(f"--examples names {number}, and the evaluation data has 0 to {len(told) - 1}.")
    return told[np.asarray(asked)]

"""What the model of a run costs for one example, as rows of the report's cost tree."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.data import Described
from effjax.measure.cost import Cost, count
from effjax.measure.tree import Module, short, tree
from effjax.train.program import Program
from effjax.train.tasks import served
from experiments.run.run_report import CostRow


@dataclasses.dataclass(frozen=True)
class RunCost:
    """Totals, and the tree as rows.

    Attributes:
      parameters: elements of all parameters.
      macs: multiply-accumulates of one forward pass on one example (a picture, a row of tokens).
      columns: headings of the cells of `rows`.
      rows: the module tree, parents before children.
    """

    parameters: int
    macs: int
    columns: Sequence[str]
    rows: Sequence[CostRow]


def forward_cost(program: Program) -> Cost:
    """Counts the evaluation pass of the task on one example."""
    state = program.shapes
    return task_cost(program.task, program.data, {"params": state.params, **state.collections})


def task_cost(task: Any, data: Described, variables: Mapping[str, Any]) -> Cost:
    """Counts the evaluation pass of a task on one example of its data, from the shapes of its variables."""
    batch = {**data.example_batch(1), "mask": np.ones((1,), np.float32)}
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.asarray(x).dtype), batch)

    def forward(params, collections, batch):
        return task.metrics({"params": params, **collections}, batch)

    needed = served(task, variables)
    return count(forward, needed.pop("params"), needed, batch)


def cost_of(program: Program, depth: int = 3) -> RunCost:
    """The cost of a run's model, down to `depth` levels of modules."""
    cost = forward_cost(program)
    rows = [
        CostRow(
            module.name or "total",
            level,
            (f"{module.parameters:,}", short(module.total()), short(module.whole.bytes)),
        )
        for level, module in _walk(tree(cost), depth)
    ]
    return RunCost(cost.parameters, cost.macs, ("parameters", "MACs", "bytes"), rows)


def _walk(module: Module, depth: int, level: int = 0) -> Iterator[tuple[int, Module]]:
    yield level, module
    if level < depth:
        for child in module.children:
            yield from _walk(child, depth, level + 1)

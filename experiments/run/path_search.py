"""From a trained language model to examples with the layers that each of them needs."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.data.arrays import ArrayWriter, unused
from effjax.decoding.layer_router import ACTIONS
from effjax.decoding.layer_search import Search, agreed, find_plans
from effjax.errors import UsageError
from effjax.models.routed_lm import routed, with_routers
from effjax.parallel.sharding import activate
from effjax.train.program import Program
from effjax.train.tasks.language import Language, cross_entropy
from effjax.train.tasks.layer_routing import solved
from experiments.run.closing import closing_table
from experiments.run.restore import load_run

FIELDS = "tokens", "targets", "segments", "positions", "weights"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is searched for.

    Attributes:
      examples: how many.
      batch: how many side by side.
      seed: of the search.
      agree: plans, those found most often, that all examples choose from; 0 leaves each its own.
      cost: see `effjax.decoding.layer_search.agreed`.
    """

    examples: int
    batch: int
    seed: int
    agree: int = 0
    cost: float = 0.2

    def __post_init__(self) -> None:
        for name in ("examples", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name}={getattr(self, name)} must be at least 1.")


def run(workdir: str, out: str, search: Search, request: Request, *, step: int | None = None) -> int:
    """Writes the folder and prints what was found; returns the exit code.

    Raises:
      UsageError: for a run that is no language model, or a folder that exists.
    """
    unused(out)  # now, not after the search
    program, variables = load_run(workdir, step)
    rows = searched(program, variables, search, request)
    found = rows["right"] > 0
    if not found.any():
        raise UsageError(
            f"no plan answers any of {request.examples} examples: train the model of '{workdir}'."
        )
    counts = rows["counts"][found]
    labels = np.bincount(counts.ravel(), minlength=len(ACTIONS))
    kept = {name: rows[name][found] for name in (*FIELDS, "counts")}
    kept["labels"] = np.tile(labels.astype(np.float32), (len(counts), 1))
    origin = dict(run=str(workdir), search=dataclasses.asdict(search), **dataclasses.asdict(request))
    with ArrayWriter(out, len(counts), origin) as writer:
        writer.write(0, kept)
    closing_table(
        f"plans of {counts.shape[1]} layers",
        {
            "examples": str(len(found)),
            "answered by all layers": f"{np.mean(rows['whole']):.4f}",
            "answered by some plan": f"{np.mean(found):.4f}",
            "layers of the shortest": f"{counts.sum(axis=1).mean():.3f}",
            "skip, execute, repeat": ", ".join(map(str, labels)),
            "folder": out,
        },
    )
    return 0


def searched(program: Program, variables: Any, search: Search, request: Request) -> dict[str, np.ndarray]:
    """The examples with their plans (`counts`), whether these are `right`, and the `whole` network is."""
    task = program.task
    if type(task) is not Language:
        raise UsageError(
            f"plans are of a plain language model, and this run is {type(task).__name__.lower()}."
        )
    model = routed(task.model)  # type: ignore[arg-type]
    held = with_routers(model, variables, jax.random.key(0))

    @jax.jit
    def answer(variables: Any, batch: Mapping[str, Any], counts: Any) -> Any:
        told = batch["tokens"], counts, None, batch["positions"], batch["segments"]
        logits, _ = model.apply(variables, *told, method="along")
        losses, _ = cross_entropy(logits, batch["targets"])  # [B, N]
        weights = batch["weights"]
        asked = jnp.maximum(jnp.sum(weights, axis=1), 1.0)
        return solved(logits, batch), jnp.sum(losses * weights, axis=1) / asked

    def ask(batch: Mapping[str, Any], plans: np.ndarray) -> Any:
        with activate(program.mesh, program.rules):
            return jax.device_get(answer(held, batch, jnp.asarray(plans)))

    batches, parts = list(_batches(program, request)), []
    for number, batch in enumerate(batches):
        seed = request.seed + number
        counts, found, whole = find_plans(
            search, functools.partial(ask, batch), len(batch["tokens"]), model.depth, seed
        )
        told = {name: np.asarray(batch[name]) for name in FIELDS}
        parts.append(told | dict(counts=counts, right=found, whole=whole))
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if request.agree and rows["right"].any():
        offered, often = np.unique(rows["counts"][rows["right"] > 0], axis=0, return_counts=True)
        offered = offered[np.argsort(-often, kind="stable")[: request.agree]]
        everyone = [np.ones((request.batch, 1), np.int32) * plan[None] for plan in offered]
        heard = [[ask(batch, plans) for batch in batches] for plans in everyone]  # [K][batches](2)[B]
        right, losses = (np.array([np.concatenate([b[i] for b in row]) for row in heard]) for i in range(2))
        counts, known = agreed(offered, right, losses, request.cost, search.worth)
        rows |= dict(counts=counts, right=known.astype(np.int32))
    return {name: rows[name][: request.examples] for name in rows}


def _batches(program: Program, request: Request) -> Iterator[dict[str, Any]]:
    """The first examples of the training data, in whole batches."""
    definition = dataclasses.replace(program.experiment.data, batch_size=request.batch)
    batches = definition.open().train()
    for _ in range(-(-request.examples // request.batch)):
        yield {name: jnp.asarray(leaf) for name, leaf in next(batches).items()}

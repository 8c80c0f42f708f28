"""Tuning of a trained language model by whole rows of a few matrices: S2FT.

    W' = W + scatter(rows, D)                              see `effjax.compress.s2ft`

The parameters are those of the model, from the folder `train.start`, and `changes` beside them, which alone
have a gradient; `freeze` of the optimiser leaves the others without moments. Which rows they belong to stands
in the collection `rows`, that is drawn or measured before the first step and saved with the rest. What is
evaluated and what the run is used with are the parameters W', those of the model as it is.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from effjax.compress.s2ft import SHARES, chosen, merged, partly, unchanged, units_of
from effjax.compress.storage.matrices import flat
from effjax.compress.subject import Subject, leaf_at
from effjax.compress.watch import watch
from effjax.errors import UsageError
from effjax.layers.stored import Place, kernels
from effjax.train.tasks.language import Language
from effjax.train.tasks.mean import Means

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class StructuredSparse(Language):
    """Predicts each next token, with a few rows that are tuned.

    Attributes:
      shares: regexps of kernels, each with the share of its heads (channels) that is tuned.
      worth: which: drawn, or by the norm of their rows, of what enters by them, or of the rows' gradient.
      smallest: whether those of the smallest norm are taken, and not of the largest.
      batches: how many batches of training text what enters and gradients are measured on.
    """

    shares: tuple[tuple[str, float], ...] = tuple(SHARES)
    worth: Literal["random", "weight", "activation", "gradient"] = "random"
    smallest: bool = False
    batches: int = 8

    training_only = ("changes", "rows")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smallest and self.worth == "random":
            raise UsageError("smallest has no meaning where worth='random': name a norm.")

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """The variables of the model, drawn rows, and changes that are none yet."""
        made = super().init(key, batch)
        places = kernels(made["params"])
        rows = chosen(places, self.shares, key)
        return {**made, "params": {**made["params"], "changes": unchanged(places, rows)}, "rows": rows}

    def measure(self, given: Mapping[str, Any], batches: Callable[[], Iterable[Batch]]) -> dict[str, Any]:
        """The rows of weights that were read.

        Raises:
          UsageError: where none were.
        """
        if self.worth == "random":
            return {}
        if "params" not in given:
            raise UsageError("rows are of trained weights: name their folder with config.train.start.")
        first, *rest = itertools.islice(batches(), self.batches)
        boxed = jax.eval_shape(super().init, jax.random.key(0), first)["params"]
        places = kernels(boxed)
        places = {path: places[path] for path in units_of(places, self.shares)}
        worth = self._worth(given["params"], places, [first, *rest])
        sign = -1.0 if self.smallest else 1.0
        worth = {path: sign * score for path, score in worth.items()}
        return {"rows": chosen(places, self.shares, jax.random.key(0), worth)}

    def _worth(self, params: Any, places: Mapping[str, Place], batches: list[Batch]) -> dict[str, Array]:
        """Sums of squares of every row, `[*front, K]` by path."""
        if self.worth == "activation":
            subject = Subject(Language(self.model), {"params": params}, batches[0])
            there = [{**batch, "mask": jnp.ones(len(batch["tokens"]))} for batch in batches]
            seen = watch(subject, places, there, lambda x: jnp.sum(jnp.square(x), axis=0), lambda a, b: a + b)
            return {
                path: jnp.asarray(seen[path]).reshape(*place.front, place.matrix[0])
                for path, place in places.items()
            }
        held = params
        if self.worth == "gradient":
            plain = Language(self.model)
            loss = lambda params, batch: plain.loss({"params": params}, batch, jax.random.key(0))[0]["loss"]  # noqa: E731
            slope = jax.jit(jax.grad(lambda params, batch: loss(params, batch).value()))
            slopes = [slope(params, batch) for batch in batches]
            held = jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *slopes)
        return {
            path: jnp.sum(jnp.square(flat(jnp.asarray(leaf_at(held, path)), place)), axis=-1)
            for path, place in places.items()
        }

    def tuned(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The variables with W' in the place of W."""
        params = merged(self._own(variables), variables["params"]["changes"], variables["rows"])
        return {**variables, "params": params}

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """As `Language`, of W'; only `changes` have a gradient."""
        frozen = jax.lax.stop_gradient(self._own(variables))
        params = partly(frozen, variables["params"]["changes"], variables["rows"])
        others = {name: tree for name, tree in variables.items() if name not in ("params", "rows")}
        means, collections = super().loss({"params": params, **others}, batch, key)
        return means, {**collections, "rows": variables["rows"]}

    @staticmethod
    def _own(variables: Mapping[str, Any]) -> dict[str, Any]:
        return {name: leaf for name, leaf in variables["params"].items() if name != "changes"}

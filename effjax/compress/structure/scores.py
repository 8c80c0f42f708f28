"""What units are worth: a number for every unit of every layer.

    random      drawn
    magnitude   sum_w w^2 over the numbers of a unit
    taylor      sum_batches (sum_w w dL/dw)^2           the squared change of the loss, to first order

The last is the saliency of Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR
2023, arXiv:2110.04869 (NViT), on one scale over all layers and kinds of units.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.blocks import evaluated
from effjax.compress.structure.layers import Layer, take_apart
from effjax.compress.structure.units import Kind, sizes, sums
from effjax.compress.subject import Calibration, Subject

# By the number of a layer and the kind of its units.
Scores = dict[tuple[int, Kind], Float[Array, "*heads units"]]


@runtime_checkable
class Score(Protocol):
    """A frozen dataclass that scores units; what is worth least goes first."""

    def score(
        self, subject: Subject, layers: Sequence[Layer], kinds: Sequence[Kind], calibration: Calibration
    ) -> Scores:
        """Scores every unit of these kinds."""


@dataclasses.dataclass(frozen=True)
class Random:
    """Any unit as well as any other."""

    def score(
        self, subject: Subject, layers: Sequence[Layer], kinds: Sequence[Kind], calibration: Calibration
    ) -> Scores:
        """Draws numbers between 0 and 1."""
        made: Scores = {}
        for number, (at, kind) in enumerate(wanted(layers, kinds)):
            shape = sums(layers[at], layers[at].params, kind).shape
            made[at, kind] = jax.random.uniform(jax.random.fold_in(calibration.key, number), shape)
        return made


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """The squared norm of all numbers of a unit."""

    def score(
        self, subject: Subject, layers: Sequence[Layer], kinds: Sequence[Kind], calibration: Calibration
    ) -> Scores:
        """Reads the weights alone."""
        squares = [jax.tree.map(jnp.square, layer.params) for layer in layers]
        return {(at, kind): sums(layers[at], squares[at], kind) for at, kind in wanted(layers, kinds)}


@dataclasses.dataclass(frozen=True)
class Taylor:
    """How much the loss changes when a unit goes, by its gradient.

    Attributes:
      batches: of training data.
    """

    batches: int = 16

    def score(
        self, subject: Subject, layers: Sequence[Layer], kinds: Sequence[Kind], calibration: Calibration
    ) -> Scores:
        """Runs the network forward and backward on some batches."""
        places = list(wanted(layers, kinds))

        @jax.jit
        def changes(variables: Any, batch: Any, key: Array) -> list[Array]:
            def loss(params: Any) -> Array:
                means, _ = subject.task.loss({**variables, "params": params}, batch, key)
                return means["loss"].value()

            gradients = jax.grad(loss)(variables["params"])
            products = jax.tree.map(jnp.multiply, variables["params"], gradients)
            parts = take_apart(subject.with_params(products))
            return [jnp.square(sums(parts[at], parts[at].params, kind)) for at, kind in places]

        total: list[Array] | None = None
        for number, batch in enumerate(calibration.first(self.batches)):
            keys = jax.random.split(jax.random.fold_in(calibration.key, number))
            prepared = subject.task.prepare(evaluated(batch), keys[0])
            found = changes(subject.variables, prepared, keys[1])
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        return dict(zip(places, total, strict=True))


def wanted(layers: Sequence[Layer], kinds: Sequence[Kind]) -> list[tuple[int, Kind]]:
    """The layers that have units of some kinds, with each kind that they have."""
    return [(at, kind) for at, layer in enumerate(layers) for kind in kinds if getattr(sizes(layer), kind)]

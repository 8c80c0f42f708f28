"""What units are worth: a number for every unit of every layer.

    random      drawn
    magnitude   sum_w w^2 over the numbers of a unit
    taylor      sum_batches (sum_w w dL/dw / d)^2       the squared change of the loss, to first order

The last is the saliency of Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR
2023, arXiv:2110.04869 (NViT), on one scale over all layers and kinds of units; d is 1, and in the published
code another number for some kinds.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.blocks import evaluated
from effjax.compress.structure.layers import Layer, take_apart
from effjax.compress.structure.stream import Axes, stream_axes, stream_sums
from effjax.compress.structure.units import KINDS, Kind, sizes, sums
from effjax.compress.subject import Calibration, Subject
from effjax.errors import UsageError

# By the number of a layer and the kind of its units; channels of the stream are of no layer.
Scores = dict[tuple[int, Kind], Float[Array, "*heads units"]]
EVERYWHERE = -1


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
        places = wanted(layers, kinds)
        for number, (place, like) in enumerate(_summed(subject, places, _axes(subject, places)).items()):
            made[place] = jax.random.uniform(jax.random.fold_in(calibration.key, number), like.shape)
        return made


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """The squared norm of all numbers of a unit."""

    def score(
        self, subject: Subject, layers: Sequence[Layer], kinds: Sequence[Kind], calibration: Calibration
    ) -> Scores:
        """Reads the weights alone."""
        squared = subject.with_params(jax.tree.map(jnp.square, subject.params))
        places = wanted(layers, kinds)
        return _summed(squared, places, _axes(subject, places))


@dataclasses.dataclass(frozen=True)
class Taylor:
    """How much the loss changes when a unit goes, by its gradient.

    Attributes:
      batches: of training data.
      divided: d by kind of units, 1 for those left out.
    """

    batches: int = 16
    divided: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.divided) - {*KINDS, "stream"})
        if unknown or not all(by > 0 for by in self.divided.values()):
            raise UsageError(
                f"divided={dict(self.divided)} is positive, by kind: {', '.join(KINDS)}, stream."
            )

    def score(
        self, subject: Subject, layers: Sequence[Layer], kinds: Sequence[Kind], calibration: Calibration
    ) -> Scores:
        """Runs the network forward and backward on some batches."""
        places = wanted(layers, kinds)
        axes = _axes(subject, places)

        @jax.jit
        def changes(variables: Any, batch: Any, key: Array) -> list[Array]:
            def loss(params: Any) -> Array:
                means, _ = subject.task.loss({**variables, "params": params}, batch, key)
                return means["loss"].value()

            gradients = jax.grad(loss)(variables["params"])
            products = jax.tree.map(jnp.multiply, variables["params"], gradients)
            summed = _summed(subject.with_params(products), places, axes)
            return [jnp.square(change / self.divided.get(kind, 1.0)) for (_, kind), change in summed.items()]

        total: list[Array] | None = None
        for number, batch in enumerate(calibration.first(self.batches)):
            keys = jax.random.split(jax.random.fold_in(calibration.key, number))
            prepared = subject.task.prepare(evaluated(batch), keys[0])
            found = changes(subject.variables, prepared, keys[1])
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        return dict(zip(places, total, strict=True))


def wanted(layers: Sequence[Layer], kinds: Sequence[Kind]) -> list[tuple[int, Kind]]:
    """The layers that have units of some kinds, with each kind that they have; the stream is before them."""
    own = [(at, kind) for at, layer in enumerate(layers) for kind in kinds if getattr(sizes(layer), kind)]
    return [(EVERYWHERE, "stream"), *own] if "stream" in kinds else own


def _axes(subject: Subject, places: Sequence[tuple[int, Kind]]) -> Axes:
    return stream_axes(subject) if (EVERYWHERE, "stream") in places else {}


def _summed(subject: Subject, places: Sequence[tuple[int, Kind]], axes: Axes) -> Scores:
    """Sums the parameters over all that belongs to each unit."""
    layers = take_apart(subject)
    return {
        (at, kind): stream_sums(subject.params, axes)
        if at == EVERYWHERE
        else sums(layers[at], layers[at].params, kind)
        for at, kind in places
    }

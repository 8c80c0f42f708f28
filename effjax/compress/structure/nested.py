"""Networks inside a network: the first layers of it, with the first heads and hidden units of each.

    W_n = W[: d_n, ...],    S_1 in S_2 in .. in S_N                  one weight set, N networks
    g = mean_k grad L(S_{n_k}),    n_k drawn without putting back,   k = 1 .. draws

Every step trains a few of the networks on the same batch, each as if it stood alone, and adds their gradients
up: there is no search and no teacher, and what is behind the prefix of a drawn network has no gradient from
it. Heads and channels that are there in more networks are trained more often, and come to matter most. A
network is taken out by slicing (`slice` of a recipe), and is an ordinary smaller one.

Valipour et al., "SortedNet, a Place for Every Network and Every Network in its Place", 2023,
arXiv:2309.00255, section 3. The width of the stream stays: units are those of `effjax.compress.structure`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.units import Kind, keep, sizes
from effjax.compress.subject import Subject
from effjax.errors import UsageError
from effjax.train.tasks.mean import Means

Batch = Mapping[str, Array]
_SHARES: tuple[Kind, ...] = ("heads", "hidden")


@dataclasses.dataclass(frozen=True)
class Inner:
    """Which network inside a network.

    Attributes:
      heads: share of the key/value heads of every layer, with the queries that they serve.
      hidden: share of the hidden units of every layer.
      depth: share of the layers.
    """

    heads: float = 1.0
    hidden: float = 1.0
    depth: float = 1.0

    def __post_init__(self) -> None:
        for name in ("heads", "hidden", "depth"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)} is a share above 0, to 1.")


def inner(subject: Subject, size: Inner) -> Subject:
    """The network of this size, by slicing; counts are rounded, and at least 1.

    Args:
      subject: the whole network; its variables may be traced.
      size: of the one inside.

    Raises:
      UsageError: for a network whose layers do not stand for themselves, or that has several stacks and
        would lose layers.
    """
    layers = take_apart(subject)
    if size.depth < 1:
        if len({layer.stack for layer in layers}) > 1:
            raise UsageError("depth is a share of one stack: the stages of a pyramid keep their layers.")
        layers = layers[: _part(size.depth, len(layers))]
    made = []
    for layer in layers:
        small = layer
        for kind in _SHARES:
            count = getattr(sizes(layer), kind)
            left = _part(getattr(size, kind), count) if count else 0
            if left < count:
                small = keep(small, kind, range(left))
        made.append(small)
    return put_together(subject, made)


def _part(share: float, count: int) -> int:
    return max(1, round(share * count))


@dataclasses.dataclass(frozen=True)
class Nested:
    """Training of all networks of a list at once.

    Attributes:
      networks: their sizes; the whole one is trained where it is listed.
      draws: how many of them every step trains.
    """

    networks: tuple[Inner, ...]
    draws: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= len(self.networks):
            raise UsageError(
                f"draws={self.draws} is at least 1 and at most the {len(self.networks)} networks."
            )


@dataclasses.dataclass(frozen=True)
class NestedTask:
    """A task in training, whose loss is that of drawn networks inside its own.

    Attributes:
      task: what all of them are trained to do.
      nested: which there are.
    """

    task: Any
    nested: Nested

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """As the task does."""
        prepared: Batch = self.task.prepare(batch, key)
        return prepared

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The means over all drawn networks; each draws its own noise.

        Raises:
          UsageError: for a network that keeps averages, of which each inside would need its own.
        """
        others = [name for name in variables if name != "params"]
        if others:
            raise UsageError(f"networks inside one cannot share {', '.join(others)}: train them apart.")
        of_draw, of_loss = jax.random.split(key)
        count, draws = len(self.nested.networks), self.nested.draws
        drawn = jax.random.choice(of_draw, count, (draws,), replace=False)  # [K]
        keys = jax.random.split(of_loss, draws)
        losses = [self._loss_of(size) for size in self.nested.networks]
        # One program for all draws, whose size is that of all networks.
        found = jax.lax.map(
            lambda one: jax.lax.switch(one[0], losses, variables, batch, one[1]), (drawn, keys)
        )
        return jax.tree.map(lambda values: jnp.sum(values, axis=0), found), {}

    def _loss_of(self, size: Inner) -> Callable[[Any, Batch, PRNGKeyArray], Means]:
        def loss(variables: Any, batch: Batch, key: PRNGKeyArray) -> Means:
            part = inner(Subject(self.task, variables, batch), size)
            means: Means = part.task.loss(part.variables, batch, key)[0]
            return means

        return loss

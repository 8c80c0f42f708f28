"""Networks in which some units or branches give nothing, where which is data to one compiled program.

A masked network has the shapes of the whole one: outgoing weights are multiplied by factors. By zeros it is
the network without the units (`units.keep`), or without the branches (`units.without`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.structure.units import Kind, silence, sizes
from effjax.compress.subject import Batch, Subject
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.mixers.attention import Attention
from effjax.mixers.shifted_window import ShiftedWindow
from effjax.train.tasks.mean import Means, add

# What gives something by itself: a whole branch, or units of a kind.
Part = Literal["mixer", "ffn", "heads", "value", "hidden"]
# By the number of a layer and the part.
Masks = Mapping[tuple[int, Part], Float[Array, "*units"]]

# The last product of a branch: without its numbers the branch gives nothing.
_LAST = {"mixer": "output", "ffn": "contract"}


def mask_shape(layer: Layer, part: Part | Kind) -> tuple[int, ...]:
    """Of the factors of a part: `()` of a branch, `[units]`, or `[heads, units]` of channels."""
    has = sizes(layer)
    if part in _LAST:
        return ()
    return (has.heads, has.value) if part == "value" else (getattr(has, part),)


def branches(layer: Layer) -> tuple[Literal["mixer", "ffn"], ...]:
    """The branches that a layer can do without, of those that are silent without their last product."""
    if getattr(layer.block, "order", "pre_norm") != "pre_norm":
        return ()
    return tuple(
        branch
        for branch in ("mixer", "ffn")
        if type(getattr(layer.block, branch, None)) in (Attention, ShiftedWindow, MLP, Gated)
    )


def but_one(
    shapes: Mapping[tuple[int, Any], tuple[int, ...]], number: Int[Array, ""]
) -> dict[tuple[int, Any], Array]:
    """Factors 0 of one unit and 1 of the others.

    Args:
      shapes: of the factors.
      number: of the unit, counted through all factors in order; -1 is none of them.
    """
    made, begun = {}, 0
    for place, shape in shapes.items():
        size = math.prod(shape)
        own = begun + jnp.arange(size) != number  # [units]
        made[place] = own.astype(jnp.float32).reshape(shape)
        begun += size
    return made


def masked(subject: Subject, variables: Any, masks: Masks) -> Subject:
    """The network with outgoing weights multiplied, for use under `jit`, `vmap` or a scan.

    Args:
      subject: the whole network.
      variables: of it.
      masks: factors.

    Raises:
      UsageError: for channels of queries and keys, which give nothing by themselves.
    """
    layers = list(take_apart(dataclasses.replace(subject, variables=variables)))
    for at, layer in enumerate(layers):
        for part, factors in _of_layer(masks, at):
            params = (
                quieter(layers[at].params, part, factors)
                if part in _LAST
                else silence(layers[at], part, factors)  # type: ignore[arg-type]
            )
            layers[at] = dataclasses.replace(layers[at], variables={**layer.variables, "params": params})
    return put_together(dataclasses.replace(subject, variables=variables), layers)


def _of_layer(masks: Masks, at: int) -> Iterator[tuple[Part, Array]]:
    return ((part, factors) for (layer, part), factors in masks.items() if layer == at)


def quieter(params: Any, branch: str, factor: Float[Array, ""] | float) -> Any:
    """All numbers of the last product of a branch multiplied, biases too."""
    last = _LAST[branch]
    quiet = jax.tree.map(lambda leaf: leaf * factor, params[branch][last])
    return {**params, branch: {**params[branch], last: quiet}}


def masked_loss(
    subject: Subject, batches: Sequence[Batch]
) -> Callable[[Mapping[tuple[int, Part], Any]], float]:
    """The task's loss in evaluation over all batches, as a function of masks.

    Args:
      subject: the whole network.
      batches: as `evaluated` gives them.
    """

    @jax.jit
    def total(variables: Any, masks: Any, batch: Batch) -> Means:
        network = masked(subject, variables, masks)
        return {"loss": network.task.metrics(network.variables, batch)["loss"]}

    def loss(masks: Mapping[tuple[int, Part], Any]) -> float:
        held = jax.tree.map(jnp.asarray, masks)
        means = [total(subject.variables, held, batch) for batch in batches]
        return float(functools.reduce(add, means)["loss"].value())

    return loss

"""What went wrong in a step whose loss or gradient is not finite."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.matching import named_leaves
from effjax.parallel.sharding import activate
from effjax.train.state import TrainState
from effjax.train.step import loss_and_gradient


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The first offender of a bad step, and how large everything else was.

    Attributes:
      step: number of the bad step.
      leaf: path of the first array that holds a number that is not finite, in the order batch, parameters,
        metrics, gradients: `gradient/blocks/mixer/query/kernel`.
      detail: how many of its numbers are NaN and infinite.
      norms: root mean square of each array over its finite numbers.
    """

    step: int
    leaf: str
    detail: str
    norms: dict[str, float]


@jax.jit
def _statistics(tree: Any) -> Any:
    """(NaNs, infinities, RMS of what is finite) of every floating-point leaf."""

    def one(leaf: Array) -> tuple[Array, Array, Array]:
        x = leaf.astype(jnp.float32)
        finite = jnp.isfinite(x)
        square = jnp.where(finite, x, 0.0) ** 2
        count = jnp.maximum(jnp.sum(finite), 1)
        return jnp.sum(jnp.isnan(x)), jnp.sum(jnp.isinf(x)), jnp.sqrt(jnp.sum(square) / count)

    return jax.tree.map(one, tree)


def diagnose(program: Any, state: TrainState, batch: Mapping[str, Array]) -> Diagnosis:
    """Repeats the forward and backward pass of the coming step and finds the first offender."""
    accumulate = program.experiment.train.accumulate

    def passes(state: TrainState, batch: Mapping[str, Array]) -> Any:
        means, grads, _ = loss_and_gradient(program.task, state, batch, program.precision, accumulate)
        return {name: mean.value() for name, mean in means.items()}, grads

    with activate(program.mesh, program.rules):
        metrics, grads = jax.jit(passes)(state, batch)
    found = {}
    for group, tree in (
        ("batch", batch),
        ("parameter", state.params),
        ("metric", metrics),
        ("gradient", grads),
    ):
        floats = {
            f"{group}/{path}": leaf
            for path, leaf in named_leaves(dict(tree)).items()
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
        }
        found.update({path: tuple(map(np.asarray, s)) for path, s in _statistics(floats).items()})
    bad = [path for path, (nans, infinities, _) in found.items() if nans or infinities]
    if bad:
        nans, infinities, _ = found[bad[0]]
        detail = f"{int(nans)} NaN, {int(infinities)} infinite"
    else:
        detail = "every array of this pass is finite, so the update itself overflowed"
    return Diagnosis(
        step=int(state.step) + 1,
        leaf=bad[0] if bad else "update",
        detail=detail,
        norms={path: float(rms) for path, (_, _, rms) in found.items()},
    )

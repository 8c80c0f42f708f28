"""One optimiser step: forward, backward, accumulate, update, average, and refuse to go on from a bad number.

    g = (1 / n) sum_i d(total_i)/d(params),   n = sum_i count_i       over the micro-batches i
    params <- optimiser(params, g)
    ema    <- d ema + (1 - d) params

Sums and counts are accumulated apart, so `accumulate=k` gives the gradient of the large batch also where
micro-batches hold different numbers of valid tokens.

The first step that meets a loss or gradient that is not finite leaves the state as it was and raises its
`halted` flag; every later step then leaves it alone too. The host may therefore look only now and then and
still finds the parameters, keys and data position from just before the bad step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from effjax.errors import UsageError
from effjax.train.ema import Ema
from effjax.train.stability import counts
from effjax.train.state import TrainState, add_examples, advance
from effjax.train.tasks.mean import Means, add, values

Step = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Precision:
    """Master weights stay in float32; the forward and backward pass run in `compute`."""

    compute: Literal["float32", "bfloat16"] = "float32"

    def cast(self, tree: Any) -> Any:
        """Casts the floating-point leaves to the compute dtype."""
        dtype = jnp.dtype(self.compute)

        def to_compute(leaf: Array) -> Array:
            return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(to_compute, tree)


# What the keys of a step are for: a purpose keeps its stream of random numbers when another is added.
_PREPARE, _LOSS = 0, 1


def loss_and_gradient(
    task: Any, state: TrainState, batch: Mapping[str, Array], precision: Precision, accumulate: int
) -> tuple[Means, Any, Any]:
    """Returns the means, the gradient of the mean loss, and the other variable collections after the pass."""
    means, grads, collections = _summed(task, state, batch, precision, accumulate, halves=False)
    return means, _mean(grads, means), collections


def loss_and_halves(
    task: Any, state: TrainState, batch: Mapping[str, Array], precision: Precision, accumulate: int
) -> tuple[Means, Any, tuple[Any, Any], Any]:
    """As `loss_and_gradient`; third, the summed gradients of the even and of the odd micro-batches."""
    means, sums, collections = _summed(task, state, batch, precision, accumulate, halves=True)
    halves = tuple(jax.tree.map(lambda g, i=i: g[i], sums) for i in range(2))
    return means, _mean(jax.tree.map(jnp.add, *halves), means), halves, collections


def _mean(grads: Any, means: Means) -> Any:
    count = jnp.maximum(means["loss"].count, 1e-9)
    return jax.tree.map(lambda g: g / count.astype(g.dtype), grads)


def _summed(
    task: Any,
    state: TrainState,
    batch: Mapping[str, Array],
    precision: Precision,
    accumulate: int,
    halves: bool,
) -> tuple[Means, Any, Any]:
    """Means, summed gradients and collections."""
    batch = task.prepare(batch, state.step_key(_PREPARE))

    def total(params: Any, collections: Any, batch: Any, key: Array) -> tuple[Array, tuple[Means, Any]]:
        variables = {"params": precision.cast(params), **collections}
        means, collections = task.loss(variables, batch, key)
        return means["loss"].total, (means, collections)

    gradient = jax.grad(total, has_aux=True)
    if accumulate == 1:
        grads, (means, collections) = gradient(state.params, state.collections, batch, state.step_key(_LOSS))
    else:
        key = state.step_key(_LOSS)
        grads, means, collections = _accumulate(gradient, state, batch, key, accumulate, halves)
    return means, grads, collections


def _accumulate(
    gradient: Callable[..., Any],
    state: TrainState,
    batch: Mapping[str, Array],
    key: Array,
    parts: int,
    halves: bool,
) -> tuple[Any, Means, Any]:
    """Runs the gradient over `parts` micro-batches in turn and adds up, with `halves` in two stacked sums."""
    # Micro-batch i takes every parts-th row, so that each device cuts its own rows and none are moved.
    micro = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)
    keys = jax.random.split(key, parts)

    def one(collections: Any, inputs: Any) -> tuple[Any, Any]:
        grads, (means, collections) = gradient(state.params, collections, *inputs)
        return collections, (grads, means)

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
        collections, grads, means = carry
        number, *inputs = inputs
        collections, (more, others) = one(collections, inputs)
        add_to = (lambda sums, g: sums.at[number % 2].add(g)) if halves else jnp.add
        return (collections, jax.tree.map(add_to, grads, more), add(means, others)), None

    shapes = jax.eval_shape(one, state.collections, jax.tree.map(lambda x: x[0], (micro, keys)))[1]
    grads, means = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if halves:
        grads = jax.tree.map(lambda g: jnp.stack([g, g]), grads)
    (collections, grads, means), _ = jax.lax.scan(
        body, (state.collections, grads, means), (jnp.arange(parts), micro, keys)
    )
    return grads, means, collections


def make_step(
    task: Any,
    optimizer: optax.GradientTransformation,
    *,
    precision: Precision,
    accumulate: int = 1,
    ema: Ema | None = None,
    halves: bool = False,
) -> Step:
    """Makes the pure function `(state, batch) -> (state, metrics)` that the loop compiles.

    Metrics are scalars: the task's averages, `gradient_norm`, `update_norm`, `parameter_norm`, what
    `effjax.train.stability` counts, and `halted`. With `halves` the optimiser is given the gradients of the
    even and of the odd micro-batches.
    """
    if accumulate < 1:
        raise UsageError(f"config.train.accumulate is {accumulate}: it must be at least 1.")
    if halves and accumulate % 2:
        raise UsageError(
            f"config.train.accumulate is {accumulate}, and config.optimizer.agvm compares the even with the "
            "odd micro-batches: make it even."
        )
    update = optax.with_extra_args_support(optimizer).update  # some look at the loss

    def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        told: dict[str, Any] = {}
        if halves:
            means, grads, told["halves"], collections = loss_and_halves(
                task, state, batch, precision, accumulate
            )
        else:
            means, grads, collections = loss_and_gradient(task, state, batch, precision, accumulate)
        told["value"] = means["loss"].value()
        updates, opt_state = update(grads, state.opt_state, state.params, **told)
        params = optax.apply_updates(state.params, updates)
        metrics = values(means) | {
            "gradient_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(params),
            **counts(opt_state),
        }
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=None if ema is None else ema.update(state.ema, params, state.step),
            collections=collections,
            key=state.key,
            examples=add_examples(state.examples, jax.tree.leaves(batch)[0].shape[0]),
            halted=state.halted,
        )
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["update_norm"])
        state = advance(state, new, finite)
        return state, metrics | {"halted": state.halted}

    return step

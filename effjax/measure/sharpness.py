"""How sharp a loss is: by what share it rises within a small box.

    phi = 100 (max_{|y_i| <= e (|x_i| + 1)} L(x + y) - L(x)) / (1 + L(x))

Of a loss of parameters the maximum is searched for (`sharpness`). Of an autoregressive model the box is put
around its logits, which need no second pass: there cross-entropy falls with the target's logit and rises
with all others, so that its maximum is the corner

    y_v = -e (|z_v| + 1)  of the target,      e (|z_v| + 1)  of all others

and is found without a search (`worst_logits`). Each place has a box of its own: the maximum of the mean is
the mean of the maxima.

The measure: Keskar et al. 2017, arXiv:1609.04836, metric 2.1 with all directions. Logits: Lee et al. 2024,
arXiv:2405.18710.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effjax.errors import UsageError

Loss = Callable[[Float[Array, " n"]], Float[Array, ""]]


def relative_rise(worst: float | Array, loss: float | Array) -> float | Array:
    """phi of the largest loss in the box and the loss itself."""
    return 100.0 * (worst - loss) / (1.0 + loss)


def sharpness(
    loss: Loss, x: Float[Array, " n"], epsilon: float, key: PRNGKeyArray, steps: int = 20, starts: int = 4
) -> Float[Array, ""]:
    """phi, its maximum by projected ascent from several places: a bound from below, exact at a corner.

    Args:
      loss: of a point.
      x: the point.
      epsilon: half the side of the box where x is 0.
      key: of the places where the ascent starts, beside the point itself; at a minimum that one stays.
      steps: of the ascent; they shrink from the whole box to a `steps`th of it.
      starts: how many other places.

    Raises:
      UsageError: for a negative radius.
    """
    if epsilon < 0:
        raise UsageError(f"epsilon={epsilon} must be at least 0.")
    radius = epsilon * (jnp.abs(x) + 1)  # [N]
    corners = jax.random.rademacher(key, (starts, *x.shape), x.dtype) * radius[None]  # [S, N]
    gradient = jax.grad(loss)

    def ascend(y: Float[Array, " n"]) -> Float[Array, ""]:
        def step(y: Array, size: Array) -> tuple[Array, Array]:
            y = jnp.clip(y + 2 * size * radius * jnp.sign(gradient(x + y)), -radius, radius)
            return y, loss(x + y)

        _, seen = jax.lax.scan(step, y, 1 / jnp.arange(1, steps + 1))
        return jnp.maximum(jnp.max(seen), loss(x + y))

    best = jnp.max(jax.vmap(ascend)(jnp.concatenate([jnp.zeros_like(x)[None], corners])))
    return jnp.asarray(relative_rise(best, loss(x)))


def worst_logits(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"], epsilon: float
) -> Float[Array, "*batch vocab"]:
    """The logits in the box around these with the largest cross-entropy, in float32."""
    logits = logits.astype(jnp.float32)
    radius = epsilon * (jnp.abs(logits) + 1)  # [.., V]
    return logits + jnp.where(jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.bool_), -radius, radius)

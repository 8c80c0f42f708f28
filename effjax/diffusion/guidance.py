"""Classifier-free guidance.

    guided = (1 - s) prediction(x_t, t, null) + s prediction(x_t, t, condition)

s = 1 is the conditional prediction and s = 0 the unconditional one, both exactly; above 1 a sample moves
away from what pictures without a condition look like. Noise, velocity and clean picture are guided alike,
being linear in each other. Ho and Salimans count from the conditional prediction: their w is s - 1.

Guidance may be confined to an interval of times: at much noise it costs variety, at little it does nothing
and its second half of the batch is not computed.

Sources: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6; Kynkäänniemi et al., "Applying
Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models", 2024, eq. 5.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.diffusion.denoiser import Condition, Denoiser, Memory
from effjax.diffusion.examples import across
from effjax.errors import UsageError


def guided(
    denoiser: Denoiser,
    scale: float | Float[Array, ""],
    null: Callable[[Condition], Condition],
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """Wraps a denoiser, which is then called once on twice the batch.

    The two copies of an example stand side by side, so that a batch sharded over devices stays where it is.
    Variances, where the network predicts them, are those of the conditional prediction.

    Args:
      denoiser: the conditional denoiser.
      scale: s.
      null: what is left of a condition that says nothing, `Diffusion.null`.
      channels: how many leading channels are guided; None means all of the picture's. The official DiT
        samples its figures with 3 of 4, the others staying conditional.
      interval: least and greatest time `t` that is guided, in the process's own unit; None means all. Where
        no example is guided the denoiser is called on the batch alone, unless it has a memory.

    Raises:
      UsageError: where `channels` is more than the picture has, or the interval is empty.
    """
    if interval is not None and not interval[0] <= interval[1]:
        raise UsageError(f"interval={interval}: guidance needs a least time that is not above the greatest.")

    def predict(
        x_t: Float[Array, "b *rest c"], t: Array, condition: Condition, memory: Memory
    ) -> tuple[Float[Array, "b *rest out"], Memory]:
        count = x_t.shape[-1] if channels is None else channels
        if not 0 < count <= x_t.shape[-1]:
            raise UsageError(f"channels={count}: guidance needs between 1 and the picture's {x_t.shape[-1]}.")
        here = None if interval is None else (interval[0] <= t) & (t <= interval[1])  # [B]
        factor = scale if here is None else across(jnp.where(here, scale, 1.0), x_t)  # [B, 1, ..., 1]

        def two_calls(memory: Memory) -> tuple[Array, Memory]:
            doubled = twice(x_t), twice(t), _beside(condition, null(condition))
            both, memory = denoiser.predict(*doubled, memory)  # [2 B, ..., out]
            conditional, unconditional = both[0::2], both[1::2]  # [B, ..., out]
            mixed = (1 - factor) * unconditional[..., :count] + factor * conditional[..., :count]
            return jnp.concatenate([mixed, conditional[..., count:]], axis=-1), memory

        def one_call(memory: Memory) -> tuple[Array, Memory]:
            return denoiser.predict(x_t, t, condition, memory)

        if here is None or jax.tree.leaves(memory):
            return two_calls(memory)
        return jax.lax.cond(jnp.any(here), two_calls, one_call, memory)

    def start(x: Array, t: Array, condition: Condition) -> Memory:
        return denoiser.start(twice(x), twice(t), _beside(condition, null(condition)))

    return Denoiser(predict, start)


def twice(x: Array) -> Array:
    """Every example two times, side by side."""
    return jnp.repeat(x, 2, axis=0)


def _beside(condition: Condition, other: Condition) -> Condition:
    """Every example's condition, and beside it the other."""

    def pair(a: Array, b: Array) -> Array:
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    return jax.tree.map(pair, condition, other)

"""Classifier-free guidance.

    guided = (1 - s) prediction(x_t, t, null) + s prediction(x_t, t, label)

s = 1 is the conditional prediction and s = 0 the unconditional one, both exactly; above 1 a sample moves
away from what pictures without a label look like. Noise, velocity and clean picture are guided alike, being
linear in each other. Ho and Salimans count from the conditional prediction: their w is s - 1.

Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, eq. 6.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError

# (x_t, t, label) -> prediction, in float32; t is the process's own time.
Denoiser = Callable[[Array, Array, Array], Array]


def guided(
    denoiser: Denoiser, scale: float | Float[Array, ""], null: int, channels: int | None = None
) -> Denoiser:
    """Wraps a denoiser, which is then called once on twice the batch.

    The two copies of an example stand side by side, so that a batch sharded over devices stays where it is.
    Variances, where the network predicts them, are those of the conditional prediction.

    Args:
      denoiser: the conditional denoiser.
      scale: s.
      null: the label that means "no label".
      channels: how many leading channels are guided; None means all of the picture's. The official DiT
        samples its figures with 3 of 4, the others staying conditional.

    Raises:
      UsageError: where `channels` is more than the picture has.
    """

    def denoise(x_t: Float[Array, "b *rest c"], t: Array, label: Array) -> Float[Array, "b *rest out"]:
        count = x_t.shape[-1] if channels is None else channels
        if not 0 < count <= x_t.shape[-1]:
            raise UsageError(f"channels={count}: guidance needs between 1 and the picture's {x_t.shape[-1]}.")
        labels = jnp.stack([label, jnp.full_like(label, null)], axis=1).reshape(-1)  # [2 B]
        both = denoiser(jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2, axis=0), labels)  # [2 B, ..., out]
        conditional, unconditional = both[0::2], both[1::2]  # [B, ..., out]
        mixed = (1 - scale) * unconditional[..., :count] + scale * conditional[..., :count]
        return jnp.concatenate([mixed, conditional[..., count:]], axis=-1)

    return denoise

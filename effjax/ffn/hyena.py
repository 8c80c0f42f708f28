"""Hyena-X as a channel mixer: two gates behind a short causal convolution along the channels.

    u = x W + b                                          [N, 3 r C]
    u'_{n f} = sum_j K_{j n} u_{n, f - taps + 1 + j} + bias_n      zeros before the first channel
    (q, k, v) = u',   y = (q * k * v) W_o + b_o

Every place of the sequence has a filter of its own, which all channels share, so that the length is fixed.
With r = 2 it has as many parameters as a perceptron of ratio 4, to 0.03%.

Source: Chandrasegaran et al., "Exploring Diffusion Transformer Designs via Grafting", NeurIPS 2025, section
4.1; the filter for each place is how its published code reads "along the channel dimension".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense, named, zeros


class HyenaFFN(nn.Module):
    """The gated channel mixer.

    Attributes:
      ratio: r, channels of each of q, k and v over the width.
      taps: of the filters.
    """

    ratio: float = 2.0
    taps: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], train: bool = False) -> Float[Array, "b n c"]:
        """Mixes the channels of each token.

        Raises:
          UsageError: for another number of tokens than the filters were made for.
        """
        length, width = x.shape[1:]
        hidden = round(width * self.ratio)
        if self.has_variable("params", "kernel"):
            held: int = self.get_variable("params", "kernel").shape[1]
            if held != length:
                raise UsageError(
                    f"Hyena has filters for {held} tokens and gets {length}: resize the picture."
                )
        u = Dense(3 * hidden, ("embed", "mlp"), name="project")(x)  # [B, N, 3 F]
        kernel = self.param("kernel", named(_even, (None, "length_table")), (self.taps, length))
        bias = self.param("bias", named(zeros, ("length_table",)), (length,), jnp.float32)
        u = constrain(along_channels(u, kernel, bias), "mlp")  # [B, N, 3 F]
        q, k, v = jnp.split(u, 3, axis=-1)  # 3 x [B, N, F]
        return Dense(width, ("mlp", "embed"), name="output")(q * (k * v))  # [B, N, C]


def along_channels(
    u: Float[Array, "b n f"], kernel: Float[Array, "taps n"], bias: Float[Array, " n"]
) -> Float[Array, "b n f"]:
    """Adds up the last channels of each token, weighed by the filter of its place."""
    taps, channels = kernel.shape[0], u.shape[-1]
    padded = jnp.pad(u, ((0, 0), (0, 0), (taps - 1, 0)))  # [B, N, taps - 1 + F]
    y = jnp.broadcast_to(bias.astype(u.dtype)[None, :, None], u.shape)
    for tap in range(taps):
        y = y + padded[:, :, tap : tap + channels] * kernel[tap].astype(u.dtype)[None, :, None]
    return y


def _even(key: Array, shape: tuple[int, ...]) -> Float[Array, "taps n"]:
    return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) * shape[0] ** -0.5

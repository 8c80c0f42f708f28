"""Short Hyena operators: two gates around short causal convolutions along the tokens.

    (q, k, v) = F(x W + b)
    y = (q * G(k * v)) W_o + b_o
    F, G:  u'_n = sum_j K_j * u_{n - taps + 1 + j} + bias,    j = 0 .. taps - 1, zeros before the first token

`*` is elementwise: every channel has filters of its own, `F` one for each of q, k and v.

    Hyena-SE   F and G
    Hyena-X    F alone: G leaves k * v as it is
    Hyena-Y    G alone

A gated sum of a few tokens in the place of attention to all: time grows with the number of tokens, and the
matrices are as large as attention's four. Tokens of a picture come row by row, and a token sees those before
it. G starts as the identity.

Sources: Hyena-SE, Ku et al., "Systems and Algorithms for Convolutional Multi-Hybrid Language Models at
Scale", 2025; Hyena-X and Hyena-Y, Chandrasegaran et al., "Exploring Diffusion Transformer Designs via
Grafting", NeurIPS 2025, figure 3; biases and initial filters from its published code.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, zeros
from effjax.layers.depthwise import depthwise_conv
from effjax.mixers.context import Context


class Hyena(nn.Module):
    """A short Hyena operator; the default is Hyena-X.

    Attributes:
      features: taps of F, on q, k and v; None leaves it out.
      inner: taps of G, on what the first gate lets through; None leaves it out.
    """

    features: int | None = 4
    inner: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.features or 1, self.inner or 1) < 1 or self.features is self.inner is None:
            raise UsageError(
                f"features={self.features} and inner={self.inner}: Hyena needs one filter of at least one "
                f"tap, or no token sees another."
            )

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *places c"], context: Context, train: bool = False
    ) -> Float[Array, "b *places c"]:
        """Mixes the tokens of whole sequences, or the places of whole maps, row by row.

        Raises:
          UsageError: for packed or padded sequences.
        """
        if not (context.segments is context.valid is None):
            raise UsageError("Hyena mixes whole sequences: give no segments and no padding.")
        shape, width = x.shape, x.shape[-1]
        x = x.reshape(shape[0], -1, width)  # [B, N, C]
        u = Dense((3, width), ("embed", None, "mlp"), name="project")(x)  # [B, N, 3, C]
        if self.features:
            taps = self.features
            kernel = self.param("feature_kernel", named(_even, (None, None, "mlp")), (taps, 3, width))
            bias = self.param("feature_bias", named(zeros, (None, "mlp")), (3, width), jnp.float32)
            flat = u.reshape(*u.shape[:2], -1)
            u = causal_filter(flat, kernel.reshape(taps, -1), bias.reshape(-1)).reshape(u.shape)
        q, k, v = (u[:, :, i] for i in range(3))  # 3 x [B, N, C]
        v = k * v
        if self.inner:
            kernel = self.param("inner_kernel", named(_identity, (None, "mlp")), (self.inner, width))
            bias = self.param("inner_bias", named(zeros, ("mlp",)), (width,), jnp.float32)
            v = causal_filter(v, kernel, bias)
        y = nn.with_logical_constraint(q * v, ("batch", "length", "mlp"))
        return Dense(width, ("mlp", "embed"), name="output")(y).reshape(shape)  # [B, *places, C]


def causal_filter(
    x: Float[Array, "b n c"], kernel: Float[Array, "taps c"], bias: Float[Array, " c"]
) -> Float[Array, "b n c"]:
    """Adds up each channel's last tokens, weighed by its own filter; the last tap is the token itself."""
    padded = jnp.pad(x, ((0, 0), (kernel.shape[0] - 1, 0), (0, 0)))[:, :, None]  # [B, taps - 1 + N, 1, C]
    y = depthwise_conv(padded, kernel[:, None].astype(x.dtype), padding=0)[:, :, 0]  # [B, N, C]
    return y + bias.astype(y.dtype)[None, None]


def _even(key: Array, shape: tuple[int, ...]) -> Float[Array, "taps *rest"]:
    """Evenly spread up to one over the square root of the taps, as PyTorch draws a depthwise filter."""
    return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) * shape[0] ** -0.5


def _identity(key: Array, shape: tuple[int, ...]) -> Float[Array, "taps c"]:
    """The filter that gives the token itself."""
    return jnp.zeros(shape, jnp.float32).at[-1].set(1.0)

"""Depthwise convolution in plain JAX: the specification, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp
from jax import lax

# GELU is by the error function, as the models here have it; Mosaic knows it, and not its complement.
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda z: 0.5 * z * (1 + lax.erf(z * 0.5**0.5)),
}


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, activation: str
) -> jax.Array:
    """activation(x * kernel + bias), each channel with its own kernel; zeros lie beyond the edges.

    Args:
      x: `[B, H, W, C]` maps.
      kernel: `[U, V, C]`, whose middle tap `[(U - 1) // 2, (V - 1) // 2]` falls on the place itself.
      bias: `[C]`, or None.
      activation: a name of `ACTIVATIONS`.

    Returns:
      `[B, H, W, C]`.
    """
    z = convolved(x, kernel).astype(jnp.float32)  # [B, H, W, C]
    if bias is not None:
        z = z + bias.astype(jnp.float32)[None, None, None]
    return ACTIVATIONS[activation](z).astype(x.dtype)


def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The sum alone, as XLA's grouped convolution."""
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        [((size - 1) // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT,
    )

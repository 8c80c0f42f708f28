"""Attention weights in logarithmic codes, with a scale of the prompt: DGQ's for cross-attention.

    c = clip( round( -log2(p / s) ), 0, 2^b - 1 ),      p ~ s 2^-c,   0 where c is the last code
    s = max p over all heads, queries and tokens but the first, for each example

The first token of a text, which says that it starts, takes most of the attention, and how much the others
take depends on the text. So the first is kept as it is, and the scale follows the prompt as it comes. Codes
are powers of two: a weight is off by a factor of at most sqrt 2.

Ryu et al., ICLR 2025, arXiv:2501.04304, section 4.3. Their published code takes one maximum for all prompts
of a batch, and has no code for 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from effjax.errors import UsageError


def prompt_scale(weights: Float[Array, "b h n s"]) -> Float[Array, "b 1 1 1"]:
    """The largest weight of any token but the first, for each example."""
    return jnp.max(weights[..., 1:], axis=(1, 2, 3), keepdims=True)


def log_codes(
    weights: Float[Array, "b h n s"], scale: Float[Array, "#b 1 1 1"], bits: int
) -> UInt8[Array, "b h n s"]:
    """Codes of the weights; the last one stands for 0.

    Raises:
      UsageError: for bits that are not from 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise UsageError(f"log_bits={bits} is not from 2 to 8.")
    share = weights.astype(jnp.float32) / jnp.where(scale == 0, 1.0, scale)
    codes = jnp.round(-jnp.log2(jnp.where(share > 0, share, 2.0**-300)))
    return jnp.clip(jnp.where(share > 0, codes, 2**bits), 0, 2**bits - 1).astype(jnp.uint8)


def from_codes(
    codes: UInt8[Array, "b h n s"], scale: Float[Array, "#b 1 1 1"], bits: int
) -> Float[Array, "b h n s"]:
    """What codes stand for."""
    powers = jnp.exp2(-codes.astype(jnp.float32))
    return jnp.where(codes == 2**bits - 1, 0.0, powers * scale)


def log_rounded(weights: Float[Array, "b h n s"], bits: int) -> Float[Array, "b h n s"]:
    """Attention to a text with all tokens but the first in codes.

    Args:
      weights: of all tokens, each row a distribution.
      bits: of a code.
    """
    if weights.shape[-1] < 2:
        return weights
    scale = prompt_scale(weights)
    rounded = from_codes(log_codes(weights[..., 1:], scale, bits), scale, bits)
    return jnp.concatenate([weights[..., :1], rounded.astype(weights.dtype)], -1)

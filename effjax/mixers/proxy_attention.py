"""Attention by proxy: one token a window attends for all of its window.

    p_w = mean of x over window w,  or one token of it
    p <- p + attention(norm(p))                                   among the N / m proxies
    y_n = cross attention(norm(x_n), norm(p)) Z                   of all N tokens, Z = 0 at first

Of the attention's N^2 products 1/m^2 are left among the proxies and 1/m from tokens to proxies, with windows
of m places. Proxies are means of tokens before their norm.

The first version of the paper drew a proxy at random; the second, its ablation (FID 19.30 by means, 20.84
by the first token, 21.00 at random) and the published code take means, in training as in sampling.

Source: Wang et al., "Qihoo-T2X: An Efficient Proxy-Tokenized Diffusion Transformer for Text-to-Any-Task",
ICLR 2025, arXiv:2409.04005, section 3.2.1 and table 2b. Code: `pt_dit_diffusers.py` in Ascend/MindSpeed-MM.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from effjax.layers.dense import Dense, zeros
from effjax.layers.norms import norm
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.cross_attention import CrossAttention

Choice = Literal["mean", "first", "random"]


def proxies(
    x: Float[Array, "b windows places c"], choice: Choice, key: PRNGKeyArray | Key[Array, ""] | None = None
) -> Float[Array, "b windows c"]:
    """One token for each window.

    Args:
      x: tokens, window by window.
      choice: their mean, the first of them, or one drawn for each window of each example.
      key: of the draw; without one the first is taken, which is a token like those that were drawn.
    """
    if choice == "mean":
        return jnp.mean(x, axis=2)
    if choice == "first" or key is None:
        return x[:, :, 0]
    drawn = jax.random.randint(key, x.shape[:2], 0, x.shape[2])  # [B, w]
    return jnp.take_along_axis(x, drawn[:, :, None, None], axis=2)[:, :, 0]


class ProxyAttention(nn.Module):
    """The Global Information Interaction Module: proxies attend to each other, and all tokens to them.

    Attributes:
      heads: of both attentions.
      choice: what stands for a window, see `proxies`. A random one is drawn in training alone.
      epsilon: of the norms.
    """

    heads: int
    choice: Choice = "mean"
    epsilon: float = 1e-6

    def setup(self) -> None:
        """Names the two attentions."""
        self.among = Attention(self.heads)
        self.inject = CrossAttention(self.heads)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b windows places c"], train: bool = False
    ) -> Float[Array, "b windows places c"]:
        """What all tokens learn of each other; nothing at first, since the last projection starts at zero."""
        p = self.interact(x, train)  # [B, w, C]
        p = norm("layer_plain", self.epsilon, "inject_norm")(p)  # [B, w, C]
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, N, C]
        h = norm("layer_plain", self.epsilon, "norm")(tokens)  # [B, N, C]
        y = self.inject(h, p)  # [B, N, C]
        y = Dense(x.shape[-1], ("embed", None), kernel_init=zeros, name="project")(y)  # [B, N, C]
        return y.reshape(x.shape)

    @nn.nowrap
    def interact(self, x: Float[Array, "b windows places c"], train: bool) -> Float[Array, "b windows c"]:
        """The proxies, after they have attended to each other."""
        drawn = self.choice == "random" and train and self.has_rng("dropout")
        p = proxies(x, self.choice, self.make_rng("dropout") if drawn else None)  # [B, w, C]
        h = norm("layer_plain", self.epsilon, "proxy_norm")(p)  # [B, w, C]
        return p + self.among(h, Context(), train=train)

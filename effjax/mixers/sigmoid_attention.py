"""Attention whose weights are sigmoids: no row is normalised.

    y = sigmoid(q k^T / sqrt(d) + b) v,    b = -log n                    Ramapuram et al. 2024, section 3

n is the length that the model is trained at. It stays that length where the model sees a shorter row or
decodes: a bias that followed the row would change every weight with it. The authors find queries and keys
that are normalised (`qk_norm`) needed in language models, and a small scale of each branch in deep ones.
Their example of a language model writes b = -7.62 out, which is of its 2048 tokens, with normalised queries
and keys, rotary positions and norms behind the branches as well.

Projections, rotary positions and the cache are those of `effjax.mixers.attention`. Whole sequences go through
`pallas_kernels.sigmoid_attention`, which has kernels for TPUs and Hopper GPUs.

"Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv:2409.04431.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.decoding.cache import Cache
from effjax.errors import UsageError
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.dot_product import dot_products
from effjax.mixers.stats import Watch
from effjax.parallel.each_device import on_each_device


class SigmoidAttention(Attention):
    """Sigmoid attention of every token to every token.

    Attributes:
      length: n above; None takes the length of each row, and then nothing can be decoded.
      logit_bias: b above; None means `-log length`.
      implementation: of the kernel; None chooses by the platform that is lowered for.
    """

    length: int | None = None
    logit_bias: float | None = None
    implementation: Literal["reference", "gpu", "tpu"] | None = None

    @nn.compact
    def attend(
        self,
        x: Float[Array, "b n c"],
        context: Context,
        cache: Cache | None,
        watch: Watch | None = None,
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Attends among the tokens of `x` (no cache), or from them to the cache they are added to.

        Raises:
          UsageError: for what is of softmax attention alone, and for a cache without a length.
        """
        self._check(context, watch)
        positions = self.positions(x, context, cache)
        q, k, v = self.project(x, positions, context)
        if cache is None:
            y = self._whole(q, k, v, context, self._bias(x.shape[1]))  # [B, N, H, E]
        else:
            y, cache = self.remember(q, k, v, positions, cache, context, self.weights, self.causal)
        return self.output(y, x.shape[-1], context), cache

    @nn.nowrap
    def _whole(
        self,
        q: Float[Array, "b n h d"],
        k: Float[Array, "b n g d"],
        v: Float[Array, "b n g e"],
        context: Context,
        bias: float,
    ) -> Float[Array, "b n h e"]:
        """What the tokens of whole sequences take; each device attends for its own rows and heads."""
        # Pallas is slow to import, and most programs have no use for it.
        from pallas_kernels.sigmoid_attention import sigmoid_attention

        def attention(q: Any, k: Any, v: Any, segments: Any, valid: Any) -> Any:
            return sigmoid_attention(
                *(q, k, v, segments),
                valid=valid,
                scale=self.scale,
                bias=bias,
                causal=self.causal,
                implementation=self.implementation,
            )

        # Query heads are cut as the key heads they share: a device has both.
        heads, row = ("batch", None, "kv_heads", None), ("batch", None)
        cut = on_each_device(attention, (heads, heads, heads, row, row), heads)
        return cut(q, k, v, context.segments, context.valid)

    @nn.nowrap
    def weights(
        self,
        queries: Float[Array, "b n h d"],
        keys: Float[Array, "b s g d"],
        allowed: Bool[Array, "#b #h #n s"],
        bias: Float[Array, "b h 1 s"] | None,
    ) -> Float[Array, "b h n s"]:
        """How much of each cached value a query takes, in float32; `bias` is added to the logits."""
        scale = queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = dot_products(queries, keys) * scale + self._bias(None)  # [B, H, N, S]
        logits = logits if bias is None else logits + bias
        return jnp.where(allowed, jax.nn.sigmoid(logits), 0)

    @nn.nowrap
    def _bias(self, length: int | None) -> float:
        """b above, for rows of a length; None where rows grow."""
        if self.logit_bias is not None:
            return self.logit_bias
        length = length if self.length is None else self.length
        if length is None:
            raise UsageError(
                "sigmoid attention decodes with the bias that it is trained with: set mixer.length to the"
                " length of the training rows."
            )
        return -math.log(length)

    @nn.nowrap
    def _check(self, context: Context, watch: Watch | None) -> None:
        fields = ("window", "logit_cap", "top", "unified")
        known = {name: getattr(self, name) for name in fields}
        known |= {f"context.{name}": getattr(context, name) for name in ("window", "share", "size")}
        for name, value in known.items():
            if value is not None:
                raise UsageError(f"sigmoid attention has no {name}: that is of softmax attention.")
        if watch is not None:
            raise UsageError("sigmoid attention does not tell its weights.")

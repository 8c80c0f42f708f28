"""The router of one block: from what enters the block to skip, execute or repeat.

    m_w = mean of x_t over window w,   w = 1 .. W          windows of floor(T / W) tokens, the rest left out
    z = 1/W sum_w (GELU(m_w A + a) B + b)                  [3]
    action = argmax z                                      0 skip, 1 execute, 2 repeat

T is the number of tokens that are read, W the smaller of `windows` and T. One decision is taken for a whole
sequence. With W = 1 the windows are the mean of all tokens. A router has `d b + b + 3 b + 3` parameters.

Source: Heakl et al., "Dr.LLM: Dynamic Layer Routing in LLMs", ICLR 2026, arXiv:2510.12773; sizes, the
tanh form of GELU and Xavier weights as in the authors' github.com/parameterlab/dr-llm.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense

# How often a block runs.
SKIP, EXECUTE, REPEAT = ACTIONS = 0, 1, 2


class LayerRouter(nn.Module):
    """Says how often a block shall run for each sequence.

    Attributes:
      windows: runs of tokens whose means are judged apart.
      bottleneck: channels between its two matrices.
    """

    windows: int = 8
    bottleneck: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("windows", "bottleneck"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1.")

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], reads: Bool[Array, "b n"]) -> Float[Array, "b 3"]:
        """Returns the logits of the three actions.

        Args:
          x: what enters the block. No gradient goes into it.
          reads: tokens that count; a sequence without any is judged by zeros.
        """
        means, there = window_means(jax.lax.stop_gradient(x), reads, self.windows)  # [B, W, C], [B, W]
        h = Dense(self.bottleneck, ("embed", "mlp"), name="expand")(means)  # [B, W, b]
        h = nn.gelu(h, approximate=True)
        z = Dense(len(ACTIONS), ("mlp", None), name="contract")(h).astype(jnp.float32)  # [B, W, 3]
        count = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)  # [B, 1]
        return jnp.sum(jnp.where(there[:, :, None], z, 0.0), axis=1) / count  # [B, 3]


def window_means(
    x: Float[Array, "b n c"], reads: Bool[Array, "b n"], windows: int
) -> tuple[Float[Array, "b w c"], Bool[Array, "b w"]]:
    """The mean of each window of the tokens that count, and which windows there are.

    Rows may have different numbers of tokens: the windows of a row are as long as its own number says, and a
    row of fewer tokens than `windows` has as many windows as tokens.
    """
    total = jnp.sum(reads, axis=1, dtype=jnp.int32)[:, None]  # [B, 1]
    count = jnp.minimum(total, windows)  # [B, 1]
    size = total // jnp.maximum(count, 1)  # [B, 1]
    place = jnp.cumsum(reads, axis=1, dtype=jnp.int32) - 1  # [B, N], among those that count
    window = jnp.where(reads, place // jnp.maximum(size, 1), windows)  # [B, N]
    number = jnp.arange(windows, dtype=jnp.int32)
    there = number[None] < count  # [B, W]
    # The tokens behind the last whole window have the number of none.
    members = (window[:, None] == number[None, :, None]) & there[:, :, None]  # [B, W, N]
    share = members / jnp.maximum(size, 1)[:, :, None]  # [B, W, N]
    return jnp.einsum("bwn,bnc->bwc", share.astype(x.dtype), x), there

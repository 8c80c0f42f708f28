"""Bidirectional Mamba-2: what comes before a token and what comes after it, each gathered by a scan.

    (x, B, C, dt), z = what `effjax.mixers.mamba2` makes of every token
    y = S_forward(x, B, C, dt) + reverse(S_backward(reverse(x, B, C, dt)))
    out = rms(y silu(z)) W_out

S is the convolution and state space of `effjax.mixers.duality`. The projections are shared; each direction
has convolutions, rates and a bias of step sizes of its own, forward first in their leaves. An overview of the
sequence may stand before it: both directions read it first, the backward one in reverse, and nothing is given
out at its places.

Source: Wang et al., "LinGen", CVPR 2025, figure 3 and "review tokens". What was read of it does not say which
parameters the directions share; sharing the projections is Vision Mamba's way (Zhu et al. 2024).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.mixers.context import Context
from effjax.mixers.duality import Duality, GatedNorm, project


class Direction(Duality):
    """One of the two ways over a sequence."""

    @nn.compact
    def __call__(
        self, u: Float[Array, "b n i"], chosen: Float[Array, "b n k"], step: Float[Array, "b n h"]
    ) -> Float[Array, "b n i"]:
        """Runs from the first token to the last, and returns y in float32."""
        before = (0, 0), (self.width - 1, 0), (0, 0)
        return self.recur(jnp.pad(u, before), jnp.pad(chosen, before), step)[0]


class BidirectionalMamba2(nn.Module):
    """A gated state space layer of heads that looks both ways.

    Attributes:
      expand: inner channels I, in widths.
      state: numbers `S` that every channel of a head remembers.
      head: channels of a head.
      groups: each shares what is written and read among its heads.
      width: taps of the convolutions.
      epsilon: of the norm before the output.
      chunk: tokens that are computed as one product; it changes time and memory and not the result.
    """

    expand: float = 2.0
    state: int = 128
    head: int = 64
    groups: int = 1
    width: int = 4
    epsilon: float = 1e-5
    chunk: int = 256

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Context,
        train: bool = False,
        overview: Float[Array, "b m c"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Mixes the tokens of whole sequences.

        Args:
          x: tokens.
          context: of it nothing may be said about single tokens.
          train: changes nothing.
          overview: tokens that both directions read first.

        Raises:
          UsageError: for a context with positions, segments, valid or size.
        """
        if not (context.positions is context.segments is context.valid is context.size is None):
            raise UsageError(
                "bidirectional_mamba2 knows its tokens by their order alone: no positions, segments, valid "
                "or size."
            )
        tokens = x if overview is None else jnp.concatenate([overview, x], axis=1)  # [B, M + N, C]
        m, channels = tokens.shape[1] - x.shape[1], x.shape[-1]
        fields: dict[str, Any] = dict(
            state=self.state, head=self.head, groups=self.groups, width=self.width, chunk=self.chunk
        )
        inner, heads, selected = Duality(**fields).sizes(channels, self.expand)
        made = project(tokens, inner, selected, heads, use_bias=False)
        z = Dense(inner, ("embed", "mlp"), use_bias=False, name="gate")(x)  # [B, N, I]
        ways = nn.vmap(
            Direction,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=2,
            metadata_params={nn.PARTITION_NAME: None},
        )(**fields, name="directions")
        both = ways(*(jnp.stack([part, _reversed(part, m)]) for part in made))[:, :, m:]  # [2, B, N, I]
        y = both[0] + both[1][:, ::-1]  # [B, N, I]
        y = GatedNorm(self.groups, self.epsilon, name="norm")(y, z)  # [B, N, I]
        return Dense(channels, ("mlp", "embed"), use_bias=False, name="output")(y)  # [B, N, C]


def _reversed(x: Float[Array, "b n k"], m: int) -> Float[Array, "b n k"]:
    """The first `m` tokens in reverse, and behind them the others in reverse."""
    return jnp.concatenate([x[:, :m][:, ::-1], x[:, m:][:, ::-1]], axis=1)

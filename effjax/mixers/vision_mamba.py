"""Bidirectional Mamba: every token's state gathers what comes before it, and another one what comes after.

    u = x W_in,   z = x W_gate
    y = (S_forward(u) + reverse(S_backward(reverse(u)))) / 2
    out = (y silu(z)) W_out

S is the convolution and selective state space of `effjax.mixers.selective`, with parameters of its own for
each direction; the projections are shared. Work and memory are linear in the number of tokens. Where tokens
were left out (`Context.positions`), the state decays over their places.

Source: Vision Mamba, Zhu et al. 2024, algorithm 1; the published code halves the sum.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.mixers.context import Context
from effjax.mixers.selective import Selective
from effjax.mixers.stats import Stats


class Direction(Selective):
    """One of the two ways over a sequence."""

    @nn.compact
    def __call__(
        self, u: Float[Array, "b n i"], rank: int, gaps: Int[Array, "b n"] | None, reverse: bool = False
    ) -> Float[Array, "b n i"]:
        """Runs from the first token to the last or back; before each it reads `gaps` tokens are missing."""
        around = (0, self.width - 1) if reverse else (self.width - 1, 0)
        taps = jnp.pad(u, ((0, 0), around, (0, 0)))  # [B, width - 1 + N, I]
        return self.recur(taps, rank, gaps=gaps, reverse=reverse)[0]


class VisionMamba(nn.Module):
    """A gated selective state space layer that looks both ways.

    Attributes:
      expand: inner channels I, in widths.
      state: numbers S that each inner channel remembers.
      width: taps of the convolution.
      rank: channels that the step size is made of; None means a sixteenth of the width, rounded up.
      chunk: tokens that one associative scan covers; it changes time and memory and not the result.
      aligned: whether the state decays over tokens that were left out; False runs over those that are left as
        if they were neighbours, which Zhan et al. 2024 find to be worse.
      implementation: as `Selective` has it; kernels read back in place, the others a reversed copy.
    """

    expand: float = 2.0
    state: int = 16
    width: int = 4
    rank: int | None = None
    chunk: int = 64
    aligned: bool = True
    implementation: Literal["chunks", "kernel", "reference"] = "chunks"

    def __call__(
        self, x: Float[Array, "b n c"], context: Context, train: bool = False
    ) -> Float[Array, "b n c"]:
        """Mixes the tokens of whole sequences.

        Raises:
          UsageError: for a context with segments, valid or size.
        """
        return self.run(x, context)[0]

    def observe(
        self,
        x: Float[Array, "b n c"],
        context: Context,
        needs: tuple[str, ...],
        choose: None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b n c"], Stats]:
        """Mixes like `__call__`, and tells what it computed before it is projected back to the width.

        Raises:
          UsageError: for something else, or a choice of tokens inside.
        """
        if choose is not None or set(needs) - {"output"}:
            raise UsageError("vision_mamba tells its output alone, and mixes all tokens or none.")
        y, inner = self.run(x, context)
        return y, Stats(x, output=inner)

    @nn.compact
    def run(
        self, x: Float[Array, "b n c"], context: Context
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n i"]]:
        """Returns the mixed tokens, and what they are projected from."""
        if not (context.segments is context.valid is context.size is None):
            raise UsageError(
                "vision_mamba knows its tokens by their order alone: no segments, valid or size."
            )
        channels = x.shape[-1]
        inner = round(channels * self.expand)
        rank = math.ceil(channels / 16) if self.rank is None else self.rank
        u = Dense(inner, ("embed", "mlp"), use_bias=False, name="input")(x)  # [B, N, I]
        z = Dense(inner, ("embed", "mlp"), use_bias=False, name="gate")(x)  # [B, N, I]
        before = behind = None
        if context.positions is not None and self.aligned:
            missing = jnp.diff(context.positions, axis=1) - 1  # [B, N - 1], between neighbours
            before = jnp.pad(missing, ((0, 0), (1, 0)))  # [B, N]
            behind = jnp.pad(missing, ((0, 0), (0, 1)))  # [B, N]
        fields: dict[str, Any] = dict(chunk=self.chunk, implementation=self.implementation)
        ahead = Direction(self.state, self.width, **fields, name="forward")(u, rank, before)
        backward = Direction(self.state, self.width, **fields, name="backward")
        if self.implementation == "chunks":
            back = backward(u[:, ::-1], rank, None if behind is None else behind[:, ::-1])[:, ::-1]
        else:
            back = backward(u, rank, behind, reverse=True)
        y = (ahead + back) / 2  # [B, N, I]
        y = y.astype(x.dtype) * jax.nn.silu(z)  # [B, N, I]
        return Dense(channels, ("mlp", "embed"), use_bias=False, name="output")(y), y  # [B, N, C]

"""Semantic tokens: few cluster centres, found by attention, take the place of the image tokens.

    P   = pool(X)                                                    M tokens, a grid of windows
    S_1 = layer(P, [P; X])
    S_2 = layer(S_1 + G, [S_1; X]),   G in R^{M x C} learned centres
    layer(Q, Y):  Z = Q + attention(norm(Q), norm(Y)),  layer = Z + mlp(norm(Z))

The pooled tokens start each centre somewhere in the picture, and the learned ones let it leave its window.
Later blocks run on S_2. Where a dense map is wanted, each image token takes its part back, R = layer(X, S):
a dumbbell of generating, processing and recovering, of which a network may have several.

Source: Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023,
arXiv:2303.08685. The largest value is pooled, keys count the queries themselves, one norm serves queries and
keys, and G is part of the residual stream, as in the published code (models/layers.py). That has Swin alone,
and its runs had no P in S_1: `shortcut=False`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import ffn
from effjax.errors import UsageError
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense, named, truncated_normal
from effjax.layers.drop import stochastic_depth
from effjax.layers.norms import norm
from effjax.mixers.dot_product import attention_weights, weighted_sum
from effjax.tokens.assignment import Mixture, apply, between
from effjax.tokens.tokens import Tokens


class CrossLayer(nn.Module):
    """A transformer layer whose queries are not its keys.

    Attributes:
      heads: of the attention.
      ratio: hidden width of the perceptron, as a multiple of the width.
      epsilon: of the norms.
      layer_scale: initial value of the channel scales; None leaves them out.
      shortcut: whether queries are added to what they found.
      drop_path: stochastic depth of both branches.
    """

    heads: int
    ratio: float = 4.0
    epsilon: float = 1e-6
    layer_scale: float | None = None
    shortcut: bool = True
    drop_path: float = 0.0

    @nn.compact
    def __call__(
        self, queries: Float[Array, "b m c"], tokens: Float[Array, "b n c"], train: bool = False
    ) -> tuple[Float[Array, "b m c"], Float[Array, "b m n"]]:
        """Returns the new queries, and how much each took of every token, a mean over the heads."""
        width = queries.shape[-1]
        if width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}.")
        shared = norm("layer", self.epsilon, "mixer_norm")
        inner, outer = shared(queries), shared(tokens)
        head, axes = (self.heads, width // self.heads), ("embed", "heads", "head_dim")
        q = Dense(head, axes, name="query")(inner)  # [B, M, H, D]
        k, v = Dense(head, axes, name="key")(outer), Dense(head, axes, name="value")(outer)  # [B, N, H, D]
        weights = attention_weights(q, k, mask=None, causal=False)  # [B, H, M, N]
        h = weighted_sum(weights.astype(v.dtype), v)  # [B, M, H, D]
        h = Dense(width, ("heads", "head_dim", "embed"), inputs=2, name="output")(h)  # [B, M, C]
        h = self._branch(h, "mixer_scale", train)
        x = queries + h if self.shortcut else h  # [B, M, C]
        h = ffn.MLP(ratio=self.ratio, name="ffn")(norm("layer", self.epsilon, "ffn_norm")(x))
        return constrain(x + self._branch(h, "ffn_scale", train)), jnp.mean(weights, axis=1)

    @nn.nowrap
    def _branch(self, h: Float[Array, "b m c"], name: str, train: bool) -> Float[Array, "b m c"]:
        if self.layer_scale is not None:
            init = named(nn.initializers.constant(self.layer_scale), ("norm",))
            h = h * self.param(name, init, (h.shape[-1],), jnp.float32).astype(h.dtype)[None, None]
        return stochastic_depth(self, h, self.drop_path, train) if self.drop_path else h


class Semantic(nn.Module):
    """A grid of semantic tokens for the whole picture: an entry of a schedule.

    Attributes:
      side: of the grid; `side^2` tokens are left.
      heads: of both layers.
      ratio: as in `CrossLayer`, like the following.
      epsilon: of the norms.
      layer_scale: of both layers.
      shortcut: of the first layer.
      drop_path: of both layers.
      centres: whether there are learned ones.
      recoverable: whether the image tokens are kept for a `Recover` later in the schedule.
    """

    side: int
    heads: int
    ratio: float = 4.0
    epsilon: float = 1e-6
    layer_scale: float | None = None
    shortcut: bool = True
    drop_path: float = 0.0
    centres: bool = True
    recoverable: bool = False

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> Tokens:
        """Generates; each original token then belongs to the semantic one that took most of it.

        Raises:
          UsageError: where the tokens are no whole grid any more, or a grid smaller than asked for.
        """
        if tokens.grid is None or not tokens.whole or tokens.held:
            raise UsageError(
                "semantic tokens are pooled from a whole grid: put them before other reductions."
            )
        x = tokens.inner(tokens.x)  # [B, N, C]
        pooled = max_pool(x.reshape(x.shape[0], *tokens.grid, -1), self.side)  # [B, side, side, C]
        s = pooled.reshape(x.shape[0], -1, x.shape[-1])  # [B, M, C]
        s, _ = self._layer("first", s, x, s, train)
        keys = s
        if self.centres:
            init = named(truncated_normal(0.02), (None, "embed"))
            s = s + self.param("centres", init, s.shape[1:], jnp.float32).astype(s.dtype)[None]
        s, weights = self._layer("second", s, x, keys, train)
        bag = became(tokens, s, weights)
        return dataclasses.replace(bag, carried=x) if self.recoverable else bag

    @nn.nowrap
    def _layer(
        self, name: str, s: Float[Array, "b m c"], x: Float[Array, "b n c"], own: Array, train: bool
    ) -> tuple[Float[Array, "b m c"], Float[Array, "b m n"]]:
        shortcut = self.shortcut or name != "first"
        layer = CrossLayer(
            self.heads, self.ratio, self.epsilon, self.layer_scale, shortcut, self.drop_path, name=name
        )
        s, weights = layer(s, jnp.concatenate([own, x], axis=1), train)
        return s, weights[:, :, own.shape[1] :]


class Recover(nn.Module):
    """The image tokens again, each with what it finds among the semantic ones: an entry of a schedule.

    Attributes:
      heads: as in `CrossLayer`, like the following.
      ratio: hidden width of the perceptron.
      epsilon: of the norms.
      layer_scale: of the layer.
      drop_path: of the layer.
    """

    heads: int
    ratio: float = 4.0
    epsilon: float = 1e-6
    layer_scale: float | None = None
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, tokens: Tokens, train: bool) -> Tokens:
        """Recovers.

        Raises:
          UsageError: where no image tokens were kept.
        """
        if tokens.carried is None:
            raise UsageError("no image tokens were kept to recover: generate with recoverable=True.")
        layer = CrossLayer(
            self.heads, self.ratio, self.epsilon, self.layer_scale, drop_path=self.drop_path, name="layer"
        )
        x, _ = layer(tokens.carried, tokens.inner(tokens.x), train)  # [B, N, C]
        return Tokens.of(between(tokens, x, tokens.x), tokens.ends, tokens.held, tokens.grid)


def became(tokens: Tokens, x: Float[Array, "b m c"], weights: Float[Array, "b m n"]) -> Tokens:
    """A bag in which `x` stand for the tokens between the ends, with sizes all alike.

    Args:
      tokens: the bag before.
      x: what took their place.
      weights: how much of each old token is in each new one.
    """
    # Places follow from the weights; no features go through them.
    bare = dataclasses.replace(tokens, x=tokens.x[:, :, :0])
    made = apply(Mixture(jax.lax.stop_gradient(weights)), bare, proportional=False)
    return dataclasses.replace(made, x=between(tokens, x, tokens.x))


def max_pool(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b s s c"]:
    """The largest value in each of `side x side` windows, which overlap where they do not tile the map.

    window i of n places:  floor(i n / side) up to ceil((i + 1) n / side)
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n < side:
            raise UsageError(f"a grid of {x.shape[1]} x {x.shape[2]} tokens has no {side} x {side} windows.")
        windows = [
            jnp.max(jax.lax.slice_in_dim(x, i * n // side, -(-(i + 1) * n // side), axis=axis), axis=axis)
            for i in range(side)
        ]
        x = jnp.stack(windows, axis=axis)
    return x

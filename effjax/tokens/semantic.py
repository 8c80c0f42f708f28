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
which `effjax.models.blocks.dumbbell` is, and its runs had no P in S_1: `shortcut=False`.
"""

import dataclasses
from collections.abc import Callable

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

# From queries [B, M, H, D], keys and values [B, N, H, D] to [B, M, H, D], and weights [B, H, M, N] or None.
Attend = Callable[[Array, Array, Array], tuple[Array, Array | None]]


def everywhere(
    q: Float[Array, "b m h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"]
) -> tuple[Float[Array, "b m h d"], Float[Array, "b h m n"]]:
    """Attention of every query to every key, and its weights."""
    weights = attention_weights(q, k, mask=None, causal=False)
    return weighted_sum(weights.astype(v.dtype), v), weights


class CrossLayer(nn.Module):
    """A transformer layer whose queries are not its keys.

    Attributes:
      heads: of the attention.
      ratio: hidden width of the perceptron, as a multiple of the width.
      epsilon: of the norms.
      layer_scale: initial value of the channel scales; None leaves them out.
      shortcut: whether queries are added to what they found; where not, this branch is never dropped.
    """

    heads: int
    ratio: float = 4.0
    epsilon: float = 1e-6
    layer_scale: float | None = None
    shortcut: bool = True

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b m c"],
        tokens: Float[Array, "b n c"],
        drop_rate: Float[Array, ""] | float = 0.0,
        train: bool = False,
        attend: Attend = everywhere,
    ) -> tuple[Float[Array, "b m c"], Float[Array, "b m n"] | None]:
        """Returns the new queries, and how much each took of every token, a mean over the heads.

        Args:
          queries: who looks.
          tokens: who is looked at.
          drop_rate: stochastic depth of both branches.
          train: whether this is training.
          attend: which tokens a query sees; where it tells no weights, neither does this.

        Raises:
          UsageError: where the heads do not divide the width.
        """
        width = queries.shape[-1]
        if width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}.")
        shared = norm("layer", self.epsilon, "mixer_norm")
        inner, outer = shared(queries), shared(tokens)
        head, axes = (self.heads, width // self.heads), ("embed", "heads", "head_dim")
        q = Dense(head, axes, name="query")(inner)  # [B, M, H, D]
        k, v = Dense(head, axes, name="key")(outer), Dense(head, axes, name="value")(outer)  # [B, N, H, D]
        h, weights = attend(q, k, v)  # [B, M, H, D], [B, H, M, N]
        h = Dense(width, ("heads", "head_dim", "embed"), inputs=2, name="output")(h)  # [B, M, C]
        x = self._scaled(h, "mixer_scale")  # [B, M, C]
        if self.shortcut:
            x = queries + stochastic_depth(self, x, drop_rate, train)
        h = ffn.MLP(ratio=self.ratio, name="ffn")(norm("layer", self.epsilon, "ffn_norm")(x))
        h = stochastic_depth(self, self._scaled(h, "ffn_scale"), drop_rate, train)
        return constrain(x + h), None if weights is None else jnp.mean(weights, axis=1)

    @nn.nowrap
    def _scaled(self, h: Float[Array, "b m c"], name: str) -> Float[Array, "b m c"]:
        if self.layer_scale is None:
            return h
        init = named(nn.initializers.constant(self.layer_scale), ("norm",))
        return h * self.param(name, init, (h.shape[-1],), jnp.float32).astype(h.dtype)[None, None]


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
        grid = x.reshape(x.shape[0], *tokens.grid, -1)  # [B, h, w, C]
        pooled = max_pool(grid, (self.side, self.side))  # [B, side, side, C]
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
        layer = CrossLayer(self.heads, self.ratio, self.epsilon, self.layer_scale, shortcut, name=name)
        s, weights = layer(s, jnp.concatenate([own, x], axis=1), self.drop_path, train)
        assert weights is not None  # `everywhere` tells them
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
        layer = CrossLayer(self.heads, self.ratio, self.epsilon, self.layer_scale, name="layer")
        x, _ = layer(tokens.carried, tokens.inner(tokens.x), self.drop_path, train)  # [B, N, C]
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


def max_pool(x: Float[Array, "b h w c"], sides: tuple[int, int]) -> Float[Array, "b s t c"]:
    """The largest value in each of a grid of windows, which overlap where they do not tile the map.

    window i of s on n places:  floor(i n / s) up to ceil((i + 1) n / s)
    """
    if x.shape[1] < sides[0] or x.shape[2] < sides[1]:
        raise UsageError(
            f"a grid of {x.shape[1]} x {x.shape[2]} tokens has no {sides[0]} x {sides[1]} windows."
        )
    for axis, side in enumerate(sides, start=1):
        n = x.shape[axis]
        windows = [
            jnp.max(jax.lax.slice_in_dim(x, i * n // side, -(-(i + 1) * n // side), axis=axis), axis=axis)
            for i in range(side)
        ]
        x = jnp.stack(windows, axis=axis)
    return x

"""LS convolution: a large kernel sees the surroundings and says how a small one weighs the neighbours.

    w = G(p W_4 + b_4),  p = relu(N(N(relu(N(x W_1)) * K) W_3))          large-kernel perception
    y[i, j, c] = sum_uv w[i, j, (u, v), g(c)] x[i + u - r, j + v - r, c]  small-kernel aggregation
    LS(x) = N(y)

N is a batch norm, K a depthwise kernel of 7 x 7 on half of the channels, G a norm over the places and the
nine taps of each group. The channels c with the same c mod (C / 8) are one group and share their taps, as in
the published kernel. The residual connection stands outside.

Source: LSNet, Wang et al. 2025, section 3.2, equations 4 to 7.
"""

import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.merge import Fold, at, unchanged
from effjax.errors import UsageError
from effjax.layers.conv import ConvNorm
from effjax.layers.dense import Dense, named, zeros
from effjax.layers.norms import norm
from effjax.mixers.context import Context


class LargeSmall(nn.Module):
    """A convolution whose small kernel is another at every place.

    Attributes:
      large: side of the kernel that sees.
      small: side of the kernel that aggregates.
      share: channels with the same weights.
      epsilon: of the norms.
      merged: whether the batch norms of perception are part of its projections; the last norm stays, since
        no weight that it could be part of belongs to one channel alone.
    """

    large: int = 7
    small: int = 3
    share: int = 8
    epsilon: float = 1e-5
    merged: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Context, train: bool = False
    ) -> Float[Array, "b h w c"]:
        """Mixes every place with its neighbours.

        Raises:
          UsageError: where the channels do not divide into groups.
        """
        y = aggregate(x, self._weights(x, train))  # [B, H, W, C]
        return norm("batch", self.epsilon, "norm", train=train)(y)

    @nn.nowrap
    def _weights(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w taps groups"]:
        channels = x.shape[-1]
        if channels % self.share or channels % 2:
            raise UsageError(f"{channels} channels do not divide into groups of share={self.share}.")
        half, taps, groups = channels // 2, self.small**2, channels // self.share
        form = dict[str, Any](epsilon=self.epsilon, merged=self.merged)
        h = ConvNorm(half, 1, activation="relu", name="reduce", **form)(x, train)  # [B, H, W, C / 2]
        h = ConvNorm(half, self.large, depthwise=True, name="see", **form)(h, train)  # [B, H, W, C / 2]
        h = ConvNorm(half, 1, activation="relu", name="mix", **form)(h, train)  # [B, H, W, C / 2]
        w = Dense((taps, groups), ("embed", None, None), name="weigh")(h)  # [B, H, W, taps, groups]
        return GroupedNorm(self.epsilon, name="weigh_norm")(w)

    @nn.nowrap
    def merge(self) -> tuple["LargeSmall", Fold]:
        """The three batch norms of perception become part of their projections."""
        if self.merged:
            return self, unchanged
        fold = ConvNorm(epsilon=self.epsilon).merge()[1]
        return self.clone(merged=True), at(dict.fromkeys(("reduce", "see", "mix"), fold))


class GroupedNorm(nn.Module):
    """Zero mean and unit variance over places and taps, for each example and group.

    Attributes:
      epsilon: added to the variance.
    """

    epsilon: float

    @nn.compact
    def __call__(self, w: Float[Array, "b h w taps groups"]) -> Float[Array, "b h w taps groups"]:
        """Normalises, with a scale and a bias a tap and group."""
        shape = w.shape[-2:]
        scale = self.param("scale", named(nn.initializers.ones_init(), (None, None)), shape, jnp.float32)
        bias = self.param("bias", named(zeros, (None, None)), shape, jnp.float32)
        wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        mean = jnp.mean(wide, (1, 2, 3), keepdims=True)  # [B, 1, 1, 1, groups]
        centred = wide - mean
        variance = jnp.mean(centred**2, (1, 2, 3), keepdims=True)
        y = (
            centred * jax.lax.rsqrt(variance + self.epsilon) * scale[None, None, None]
            + bias[None, None, None]
        )
        return y.astype(w.dtype)


@jax.custom_vjp
def aggregate(
    x: Float[Array, "b h w c"], weights: Float[Array, "b h w taps groups"]
) -> Float[Array, "b h w c"]:
    """A sum over the neighbours of each place with weights of its own.

    As shifted multiply-adds, in both directions: the neighbourhoods, `taps` times the size of the map, are
    neither written nor kept for the gradient.

    Args:
      x: maps; zeros lie beyond the edges.
      weights: of the taps of a square kernel of odd side, row by row; channel c has those of group
        c mod groups.
    """
    taps, groups = weights.shape[-2:]
    shared = _shared(x, groups)  # [B, H, W, share, groups]
    terms = (near * weights[:, :, :, tap, None] for tap, near in _neighbours(shared, taps))
    return sum(terms, start=jnp.zeros((), x.dtype)).reshape(x.shape)


def _forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return aggregate(x, weights), (x, weights)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weights = kept
    taps, groups = weights.shape[-2:]
    g = _shared(gradient, groups)  # [B, H, W, share, groups]
    shared = _shared(x, groups)
    of_weights = [_sum(near * g) for _, near in _neighbours(shared, taps)]  # [B, H, W, groups] a tap
    # What a place gave to its neighbour to the right comes back from there: the taps in reverse.
    backward = zip(_neighbours(g, taps), _neighbours(weights, taps), strict=True)
    of_x = (g_near * w_near[:, :, :, taps - 1 - tap, None] for (tap, g_near), (_, w_near) in backward)
    total = sum(of_x, start=jnp.zeros((), x.dtype))
    return total.reshape(x.shape), jnp.stack(of_weights, 3).astype(weights.dtype)


aggregate.defvjp(_forward, _backward)


def _shared(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "b h w share groups"]:
    """Channels by group, the groups last."""
    return x.reshape(*x.shape[:3], x.shape[-1] // groups, groups)


def _sum(x: Float[Array, "b h w share groups"]) -> Float[Array, "b h w groups"]:
    """The sum over channels that share, term by term: as one reduction its input would be written first."""
    return sum((x[:, :, :, i] for i in range(x.shape[3])), start=jnp.zeros((), x.dtype))


def _neighbours(x: Float[Array, "b h w m n"], taps: int) -> Iterator[tuple[int, Float[Array, "b h w m n"]]]:
    """The map as each tap of the kernel sees it."""
    side = math.isqrt(taps)
    around = (side // 2, side // 2)
    padded = jnp.pad(x, ((0, 0), around, around, (0, 0), (0, 0)))
    for tap in range(taps):
        i, j = divmod(tap, side)
        yield tap, padded[:, i : i + x.shape[1], j : j + x.shape[2]]

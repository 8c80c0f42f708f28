"""Semantic tokens on a map of windows: STViT on Swin, and the dumbbells of STViT-R.

    P   = pool(X)                                             a grid of side x side tokens a window
    S_1 = layer(P, [P; X]),   a window sees its own P and a square of X around it
    S_2 = layer(S_1, [S_1; X])

    dumbbell   S = S_2;  S <- block(S), in the windows' grids and over the whole map by turns
               X <- layer(X, S)

The semantic tokens are a smaller map, on which later blocks run as on any other; a dumbbell ends with image
tokens again, so that a stage may have several and dense tasks find their map. `layer` is `CrossLayer`.

Source: Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", CVPR 2023,
arXiv:2303.08685, and its code (models/layers.py, class Deit of models/swin_transformer.py) as its logs show
it trained: 3 x 3 tokens a window, no residual connection in the first layer, no learned centres. There the
keys of overlapping squares are projected once a square, here once a place, which gives the same numbers.
"""

import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.axes import constrain
from effjax.mixers import windows
from effjax.mixers.context import Context
from effjax.models.blocks.metaformer import Block
from effjax.tokens.semantic import CrossLayer, everywhere, max_pool


class SemanticWindows(nn.Module):
    """A grid of semantic tokens for every window of a map.

    Attributes:
      heads: of both layers.
      window: side of a window. A map that windows do not tile is divided evenly into as many as cover it.
      side: of the grid of a window.
      reach: side of the square of image tokens that a window sees in the first layer; at the edge of the map
        it is moved inside.
      shortcut: of the first layer, as in `CrossLayer`, like the following.
      ratio: hidden width of the perceptrons.
      epsilon: of the norms.
      layer_scale: initial value of the channel scales.
    """

    heads: int
    window: int = 7
    side: int = 3
    reach: int = 10
    shortcut: bool = False
    ratio: float = 4.0
    epsilon: float = 1e-5
    layer_scale: float | None = 1e-5

    @property
    def layers(self) -> int:
        """Of the stage's depth."""
        return 2

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_rates: Float[Array, "2"],
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b h2 w2 c"], None]:
        """Returns the map of semantic tokens, and None.

        Raises:
          UsageError: where a window has fewer places than semantic tokens, or the heads do not fit.
        """
        count = -(-x.shape[1] // self.window), -(-x.shape[2] // self.window)
        pooled = max_pool(x, (count[0] * self.side, count[1] * self.side))  # [B, H', W', C]
        tokens, s = _row(x), _row(pooled)  # [B, N, C], [B, M, C]
        grid = x.shape[1], x.shape[2]
        near = functools.partial(in_windows, grid=grid, count=count, side=self.side, reach=self.reach)
        layer = functools.partial(CrossLayer, self.heads, self.ratio, self.epsilon, self.layer_scale)
        first, second = layer(self.shortcut, name="first"), layer(name="second")
        s, _ = first(s, jnp.concatenate([s, tokens], axis=1), drop_rates[0], train, near)  # [B, M, C]
        s, _ = second(s, jnp.concatenate([s, tokens], axis=1), drop_rates[1], train)  # [B, M, C]
        return constrain(s.reshape(pooled.shape)), None


class Dumbbell(nn.Module):
    """Semantic tokens, blocks on them, and the image tokens again.

    Attributes:
      generate: the first two layers; the last is made like them.
      process: the blocks between.
    """

    generate: SemanticWindows
    process: tuple[Block, ...] = ()

    @property
    def layers(self) -> int:
        """Of the stage's depth."""
        return self.generate.layers + len(self.process) + 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_rates: Float[Array, " k"],
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b h w c"], None]:
        """Returns `(x, None)`."""
        s, _ = self.generate(x, drop_rates[:2], context, train=train)  # [B, H', W', C]
        for block, rate in zip(self.process, drop_rates[2:-1], strict=True):
            # A map stays a map: only bags of tokens come out as bags.
            s, _ = block(s, rate, context, train=train)  # type: ignore[assignment]  # [B, H', W', C]
        like = self.generate
        recover = CrossLayer(like.heads, like.ratio, like.epsilon, like.layer_scale, name="recover")
        y, _ = recover(_row(x), _row(s), drop_rates[-1], train)  # [B, N, C]
        return constrain(y.reshape(x.shape)), None


def in_windows(
    q: Float[Array, "b m h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    grid: tuple[int, int],
    count: tuple[int, int],
    side: int,
    reach: int,
) -> tuple[Float[Array, "b m h d"], None]:
    """Attention of each window's semantic tokens to themselves and to the square of image tokens around.

    Args:
      q: of the semantic tokens, as a map row by row.
      k: of these, and of the image tokens behind them.
      v: likewise.
      grid: of the image tokens.
      count: of the windows, along either side.
      side: of the grid of semantic tokens in a window.
      reach: side of the square.
    """
    b, m, *head = q.shape
    semantic = count[0] * side, count[1] * side

    def own(t: Float[Array, "b m h d"]) -> Float[Array, "b w t h d"]:
        return windows.partition(t.reshape(b, *semantic, *head), (side, side))

    def seen(t: Float[Array, "b s h d"]) -> Float[Array, "bw s2 h d"]:
        square = squares(t[:, m:].reshape(b, *grid, *head), count, reach)
        both = jnp.concatenate([own(t[:, :m]), square], axis=2)  # [B, w, side^2 + reach^2, H, D]
        return both.reshape(-1, *both.shape[2:])

    y, _ = everywhere(own(q).reshape(-1, side**2, *head), seen(k), seen(v))  # [B w, side^2, H, D]
    y = windows.reverse(y.reshape(b, -1, *y.shape[1:]), semantic, (side, side))  # [B, H', W', H, D]
    return y.reshape(q.shape), None


def squares(
    x: Float[Array, "b h w *rest"], count: tuple[int, int], reach: int
) -> Float[Array, "b windows places *rest"]:
    """The square of places around the middle of each of a grid of windows, moved inside the map.

    place of window i of k, n places:  floor((i + 1/2) n / k - reach / 2), at least 0 and at most n - reach
    """
    # [B, H, W, ...] -> [B, i, r, W, ...] -> [B, i, r, j, r, ...]
    for axis, k in zip((1, 3), count, strict=True):
        n = x.shape[axis]
        r = min(reach, n)
        starts = [min(max(((2 * i + 1) * n - r * k) // (2 * k), 0), n - r) for i in range(k)]
        parts = [jax.lax.slice_in_dim(x, start, start + r, axis=axis) for start in starts]
        x = jnp.stack(parts, axis=axis)
    return einops.rearrange(x, "b i p j q ... -> b (i j) (p q) ...")


def _row(x: Float[Array, "b h w c"]) -> Float[Array, "b n c"]:
    """A map row by row."""
    return x.reshape(x.shape[0], -1, x.shape[-1])

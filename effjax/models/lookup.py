"""LookupViT: a transformer that works on a coarse grid of tokens and looks things up in a fine one.

    z_l = patches W + positions,    z_p = resize(z_l, M x M)
    z_p, z_l = LookupBlock(z_p, z_l),  depth times
    logits = mean(norm(z_p)) W_head

Nothing in the parameters knows M: one network works at any, and `sides` draws one of several at each step of
training. The positions of the coarse grid are those of the fine one, resized with the patches.

Source: Koner et al., "LookupViT", ECCV 2024, arXiv:2407.12753.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense, zeros
from effjax.layers.drop import linear_rates
from effjax.layers.norms import norm
from effjax.layers.patches import PatchEmbed, position_table
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.models.blocks.lookup import LookupBlock


class LookupViT(nn.Module):
    """An image classifier with two sets of tokens.

    Attributes:
      block: the block that the stack repeats.
      side: M, of the grid of compressed tokens; in training too where `sides` is empty.
      patch: side of a patch in pixels.
      dim: channels of a token.
      depth: number of blocks.
      classes: outputs of the head; 0 returns pooled features.
      sides: grids of which every step of training draws one.
      drop_path: stochastic depth of the last block, growing linearly from 0.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
    """

    block: LookupBlock
    side: int
    patch: int
    dim: int
    depth: int
    classes: int
    sides: tuple[int, ...] = ()
    drop_path: float = 0.0
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in (self.side, *self.sides):
            if side < 1:
                raise UsageError(f"a grid of {side} x {side} compressed tokens has none.")

    @nn.compact
    def __call__(
        self, images: Float[Array, "b height width channels"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns logits; `train` switches stochastic depth on, and the draw of a grid.

        Raises:
          UsageError: where patches do not tile the picture, it is not of the size that the position table was
            made for, or has fewer patches than a grid of compressed tokens.
        """
        grid = PatchEmbed(self.patch, self.dim, name="embed")(images)  # [B, h, w, C]
        for side in (self.side, *self.sides):
            if side > min(grid.shape[1:3]):
                raise UsageError(
                    f"a grid of {side} x {side} compressed tokens is finer than the "
                    f"{grid.shape[1]} x {grid.shape[2]} patches of this picture."
                )
        grid = constrain(grid + self._positions(grid))
        if train and self.sides and self.has_rng("dropout"):
            drawn = jax.random.randint(self.make_rng("dropout"), (), 0, len(self.sides))
            at_each = [functools.partial(LookupViT._pooled, side=side, train=True) for side in self.sides]
            x = nn.switch(drawn, at_each, self, grid)  # [B, C]
        else:
            x = self._pooled(grid, side=self.side, train=train)  # [B, C]
        if not self.classes:
            return x
        return Dense(self.classes, ("embed", "classes"), kernel_init=zeros, name="head")(x)

    @nn.nowrap
    def _positions(self, grid: Float[Array, "b h w c"]) -> Float[Array, "1 h w c"]:
        """The learned table of the fine grid."""
        places = grid.shape[1] * grid.shape[2]
        table = position_table(self, places, self.dim)
        return table.astype(grid.dtype).reshape(1, *grid.shape[1:])

    @nn.nowrap
    def _pooled(self, grid: Float[Array, "b h w c"], side: int, train: bool) -> Float[Array, "b c"]:
        """The mean of the compressed tokens behind the last block."""
        b, _, _, c = grid.shape
        p = jax.image.resize(grid, (b, side, side, c), "linear").reshape(b, -1, c)  # [B, M M, C]
        stack = Stack(self.block, self.depth, remat=self.remat, unroll=self.unroll, name="blocks")
        rates = linear_rates(self.drop_path, self.depth)
        (p, _), _ = stack((p, grid.reshape(b, -1, c)), Context(), each=rates, train=train)
        return jnp.mean(norm("layer", self.block.epsilon, "norm")(p), axis=1)

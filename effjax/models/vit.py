"""Vision transformer: patches, a stack of equal blocks, a linear head.

    z_0 = [class; patches W] + positions
    z_l = Block(z_{l-1}),  l = 1 .. depth
    logits = norm(z_depth)[class] W_head                          Dosovitskiy et al. 2021, eqs. 1 to 4

Sources: "An Image is Worth 16x16 Words" (2021); DeiT's sizes and recipe, Touvron et al. 2021.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, truncated_normal, zeros
from effjax.layers.drop import linear_rates
from effjax.layers.norms import layer_norm
from effjax.layers.patches import PatchEmbed
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.models.block import Block


class ViT(nn.Module):
    """An isotropic image classifier.

    Attributes:
      block: the block that the stack repeats.
      patch: side of a patch in pixels.
      dim: channels of a token.
      depth: number of blocks.
      classes: outputs of the head; 0 leaves the head out and returns pooled features.
      pool: what the head reads: the class token, or the mean of the patches (then there is no class token).
      drop_path: stochastic depth of the last block, growing linearly from 0.
      dropout: rate after adding the positions.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
    """

    block: Block
    patch: int
    dim: int
    depth: int
    classes: int
    pool: Literal["token", "mean"] = "token"
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self, images: Float[Array, "b height width channels"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns logits.

        Args:
          images: standardised pictures; both sides must be multiples of the patch.
          train: switches dropout and stochastic depth on; then a `dropout` key must be given.

        Raises:
          UsageError: where patches do not tile the picture, or the picture is not of the size that the
            position table was made for.
        """
        x = PatchEmbed(self.patch, self.dim, name="embed")(images)  # [B, h, w, C]
        x = x.reshape(x.shape[0], -1, self.dim)  # [B, h w, C]
        if self.pool == "token":
            token = self.param("class_token", named(zeros, (None, "embed")), (1, self.dim), jnp.float32)
            token = jnp.broadcast_to(token.astype(x.dtype)[None], (x.shape[0], 1, self.dim))
            x = jnp.concatenate([token, x], axis=1)  # [B, 1 + h w, C]
        x = x + self._positions(x.shape[1]).astype(x.dtype)[None]  # [B, N, C]
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))

        stack = Stack(self.block, self.depth, remat=self.remat, unroll=self.unroll, name="blocks")
        x, _ = stack(x, Context(), each=linear_rates(self.drop_path, self.depth), train=train)  # [B, N, C]

        x = layer_norm(self.block.epsilon, name="norm")(x)  # [B, N, C]
        x = x[:, 0] if self.pool == "token" else jnp.mean(x, axis=1)  # [B, C]
        if not self.classes:
            return x
        return Dense(self.classes, ("embed", "classes"), kernel_init=zeros, name="head")(x)  # [B, classes]

    @nn.nowrap
    def _positions(self, tokens: int) -> Float[Array, "n c"]:
        """The learned table, class token first."""
        if self.has_variable("params", "positions"):
            held: int = self.get_variable("params", "positions").shape[0]
            if held != tokens:
                raise UsageError(
                    f"the position table holds {held} tokens and this picture makes {tokens}: resize the "
                    f"picture, or interpolate the table when loading the weights."
                )
        init = named(truncated_normal(0.02), ("length_table", "embed"))
        return self.param("positions", init, (tokens, self.dim), jnp.float32)

"""Vision transformer: patches, a stack of equal blocks, a linear head.

    z_0 = [class; distillation; registers; patches W] + positions
    z_l = Block(z_{l-1}),  l = 1 .. depth
    logits = norm(z_depth)[class] W_head                          Dosovitskiy et al. 2021, eqs. 1 to 4

What later papers add: a class token in the middle (`class_place`) and patches that overlap (`stride`, both
Zhu et al. 2024), convolutions in place of the patch projection (`stem`), norms around it (`pixel_norm`,
`patch_norm`), a second class token whose head is taught by another network and averaged with the first
(`distillation`, Touvron et al. 2021), tokens that nobody reads (`registers`, Darcet et al. 2024), a norm
before the blocks (`pre_norm`, Radford et al. 2021), pools with parameters (`effjax.layers.pool`).

Sources: "An Image is Worth 16x16 Words" (2021); DeiT's sizes and recipe, Touvron et al. 2021.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from effjax import tokens
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers import downsample
from effjax.layers.dense import Dense, named, truncated_normal, zeros
from effjax.layers.drop import linear_rates
from effjax.layers.norms import norm
from effjax.layers.patches import PatchEmbed, check_divides, position_table
from effjax.layers.pool import KINDS as POOLS
from effjax.layers.pool import pooled
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.models.blocks.metaformer import Block
from effjax.tokens.compact import part_of
from effjax.tokens.schedule import cut
from effjax.tokens.tokens import Tokens, rows

Pool = Literal["token", "mean", "max", "mean_max", "token_mean", "none"]


class ViT(nn.Module):
    """An isotropic image classifier.

    Attributes:
      block: the block that the stack repeats.
      patch: side of a patch in pixels.
      dim: channels of a token.
      depth: number of blocks.
      classes: outputs of the head; 0 leaves the head out and returns pooled features.
      pool: what the head reads: the class token, the mean or the largest value of the patches or half of
        both, the class token beside the mean; "none" gives every token to it; a section is a pool with
        parameters over the patches, a kind in `effjax.layers.pool`.
      drop_path: stochastic depth of the last block, growing linearly from 0.
      dropout: rate after adding the positions.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
      class_token: whether there is one; None means where the pool reads it.
      class_place: whether it stands before the patches or in their middle.
      distillation: whether a second token with a head of its own follows; logits are averaged.
      registers: tokens that are mixed with the others and read by nobody.
      positioned: which tokens have a place in the position table.
      stem: from pixels to patches, a kind in `effjax.layers.downsample`; None is a projection of each patch.
      stride: pixels from one patch to the next; None means `patch`.
      patch_bias: bias of the patch projection.
      crop: whether pixels beyond the last whole patch are left out; otherwise such a picture is refused.
      pixel_norm: a norm on the pixels of each patch.
      patch_norm: a norm on the projected patches.
      pre_norm: a norm before the first block.
      final_norm: where the norm behind the last block stands.
      pool_all: whether the pool also sees the tokens that are no patches.
      representation: channels of a tanh layer between pool and head; None leaves it out.
      mask_token: whether there is a token that takes the place of masked patches.
      reduce: how tokens are reduced on their way, a kind in `effjax.tokens`.
      shared: regexps of the parameters that all blocks share, see `Stack`.
      layer_blocks: the definition of every layer, where they differ; empty means `block` for all.
    """

    block: Block
    patch: int
    dim: int
    depth: int
    classes: int
    pool: Pool | nn.Module = part(POOLS, default="token")
    drop_path: float = 0.0
    dropout: float = 0.0
    remat: str = "none"
    unroll: int = 1
    class_token: bool | None = None
    class_place: Literal["first", "middle"] = "first"
    distillation: bool = False
    registers: int = 0
    positioned: Literal["all", "class_and_patches", "patches", "none"] = "all"
    stem: nn.Module | None = part(downsample.KINDS, default=None)
    stride: int | None = None
    patch_bias: bool = True
    crop: bool = False
    pixel_norm: bool = False
    patch_norm: bool = False
    pre_norm: bool = False
    final_norm: Literal["before_pool", "after_pool", "none"] = "before_pool"
    pool_all: bool = False
    representation: int | None = None
    mask_token: bool = False
    reduce: Any = part(tokens.KINDS, default=None)
    shared: tuple[str, ...] = ()
    layer_blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool in ("token", "token_mean") and not self.has_class_token:
            raise UsageError(f"pool={self.pool!r} reads a class token: leave class_token=False out.")
        if self.distillation and self.pool != "token":
            raise UsageError(f"distillation reads two tokens: it goes with pool='token', not {self.pool!r}.")
        alone = self.has_class_token and self.prefix == 1 and self.positioned == "all"
        if self.class_place == "middle" and not alone:
            raise UsageError("class_place='middle' is for a class token alone, positioned='all'.")

    @property
    def has_class_token(self) -> bool:
        """Whether there is a class token."""
        reads = self.pool in ("token", "token_mean")
        return reads if self.class_token is None else self.class_token

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches."""
        return self.has_class_token + self.distillation + self.registers

    @property
    def positioned_prefix(self) -> int:
        """Those of them that have a place in the position table."""
        of = {"all": self.prefix, "class_and_patches": self.has_class_token + self.distillation}
        return of.get(self.positioned, 0)

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of a picture."""
        stride = self.stride or self.patch
        return (size[0] - self.patch) // stride + 1, (size[1] - self.patch) // stride + 1

    def of_patches(self, values: Shaped[np.ndarray, "b n"]) -> Shaped[np.ndarray, "b patches"]:
        """What belongs to patches, of values of the tokens that enter the blocks."""
        if self.class_place == "middle":
            return np.delete(values, (values.shape[1] - 1) // 2, axis=1)
        return values[:, self.prefix :]

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b height width channels"],
        train: bool = False,
        masked: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b *tokens classes"]:
        """Returns logits: one vector a picture, or with `pool="none"` one a token.

        Args:
          images: standardised pictures; both sides must be multiples of the patch.
          train: switches dropout and stochastic depth on; then a `dropout` key must be given.
          masked: patches, row by row, whose content is hidden behind the mask token.

        Raises:
          UsageError: where patches do not tile the picture, or the picture is not of the size that the
            position table was made for.
        """
        x = self._patches(images, train)  # [B, h, w, C]
        context = Context(grid=x.shape[1:3])
        x = x.reshape(x.shape[0], -1, self.dim)  # [B, h w, C]
        if self.patch_norm:
            x = self._norm("patch_norm", x, train)
        if self.mask_token:
            init = named(zeros, (None, "embed"))
            token = self.param("mask_token", init, (1, self.dim), jnp.float32).astype(x.dtype)
            x = x if masked is None else jnp.where(masked[:, :, None], token[None], x)
        middle = x.shape[1] // 2 if self.class_place == "middle" else 0
        x = jnp.concatenate([x[:, :middle], *self._prefix(x), x[:, middle:]], axis=1)  # [B, N, C]
        x = self._add_positions(x)
        if self.dropout:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        if self.pre_norm:
            x = self._norm("pre_norm", x, train)
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))

        options: dict[str, Any] = dict(remat=self.remat, unroll=self.unroll, shared=self.shared)
        stack = Stack(self.block, self.depth, **options, blocks=self.layer_blocks, name="blocks")
        rates = linear_rates(self.drop_path, self.depth)
        if self.reduce is None:
            bag = None
            x, _ = stack(x, context, each=rates, train=train)  # [B, N, C]
        else:
            bag = self._reduced(stack, x, context, rates, middle, train)
            x = bag.x  # [B, M, C]

        if self.final_norm == "before_pool":
            x = self._norm("norm", x, train)  # [B, N, C]
        if middle:  # to the front, where all else has it
            x, bag = _class_first(x, bag, middle)
        second = x[:, 1] if self.distillation else None  # [B, C]
        x = self._pooled(x, bag, train)  # [B, C]
        if self.final_norm == "after_pool":
            x = self._norm("norm", x, train)
        if self.representation:
            x = nn.tanh(Dense(self.representation, ("embed", "mlp"), name="representation")(x))
        if second is None:
            return self._head("head", x)  # [B, classes]
        return (self._head("head", x) + self._head("distillation_head", second)) / 2

    @nn.nowrap
    def _patches(
        self, images: Float[Array, "b height width channels"], train: bool
    ) -> Float[Array, "b h w dim"]:
        if self.stem is not None:
            check_divides(images.shape[1], images.shape[2], self.patch)
            return self.stem(images, self.dim, train=train)
        return PatchEmbed(
            self.patch,
            self.dim,
            use_bias=self.patch_bias,
            crop=self.crop,
            stride=self.stride,
            norm=self.block.norm if self.pixel_norm else None,
            epsilon=self.block.epsilon,
            name="embed",
        )(images)

    @nn.nowrap
    def _norm(self, name: str, x: Float[Array, "*batch c"], train: bool) -> Float[Array, "*batch c"]:
        return norm(self.block.norm, self.block.epsilon, name, train=train)(x)

    @nn.nowrap
    def _prefix(self, x: Float[Array, "b n c"]) -> list[Float[Array, "b m c"]]:
        """The learned tokens before the patches, for every example."""
        drawn = truncated_normal(0.02)  # equal registers would stay equal
        kinds = (
            ("class_token", int(self.has_class_token), zeros),
            ("distillation_token", int(self.distillation), drawn),
            ("registers", self.registers, drawn),
        )
        tokens = []
        for name, count, init in kinds:
            if count:
                shape = count, self.dim
                token = self.param(name, named(init, (None, "embed")), shape, jnp.float32).astype(x.dtype)
                tokens.append(jnp.broadcast_to(token[None], (x.shape[0], count, self.dim)))
        return tokens

    @nn.nowrap
    def _add_positions(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Adds the learned table to the tokens that have a place in it, class token first."""
        if self.positioned == "none":
            return x
        places = x.shape[1] - self.prefix + self.positioned_prefix
        table = position_table(self, places, self.dim).astype(x.dtype)[None]
        first, last = self.positioned_prefix, self.prefix
        if first == last:
            return x + table
        parts = x[:, :first] + table[:, :first], x[:, first:last], x[:, last:] + table[:, first:]
        return jnp.concatenate(parts, axis=1)

    @nn.nowrap
    def _reduced(
        self,
        stack: Stack,
        x: Float[Array, "b n c"],
        context: Context,
        rates: Float[Array, " depth"],
        middle: int,
        train: bool,
    ) -> Tokens:
        """Runs the blocks on a bag of tokens that they reduce.

        Which token each original one is in after a layer is sown as `tokens/layer_LAYER`.
        """
        points, before = cut(self.reduce, self.depth, self)
        ends, held = ((0, 0), (middle,)) if middle else ((self.prefix, 0), ())
        bag = Tokens.of(x, ends, held, context.grid)
        bag, origins = stack(
            bag, context, each=rates, train=train, points=points, before=before, through=part_of(self.reduce)
        )
        for layer, origin in origins.items():
            if not self.is_initializing():  # a record of one pass, and no state of the model
                self.sow("tokens", f"layer_{layer}", origin)
        return bag

    @nn.nowrap
    def _pooled(
        self, x: Float[Array, "b n c"], bag: Tokens | None, train: bool
    ) -> Float[Array, "b *tokens c2"]:
        """What the head reads; of a bag means are weighed by the sizes of the tokens."""
        first = 0 if self.pool_all else self.prefix
        patches = x[:, first:]  # [B, h w, C]
        if self.pool == "token":
            return x[:, 0]
        if self.pool == "none":
            return x
        if bag is not None and not bag.whole:
            if self.pool not in ("mean", "token_mean"):
                raise UsageError(
                    f"pool={self.pool!r} knows no sizes: reduced tokens go with a mean or a token."
                )
            size = bag.size[:, first:, None].astype(x.dtype)  # [B, M, 1]
            mean = jnp.sum(patches * size, axis=1) / jnp.sum(size, axis=1)  # [B, C]
        elif isinstance(self.pool, nn.Module) or self.pool in ("mean", "max"):
            return pooled(self.pool, patches, train, self)  # [B, C]
        else:
            mean = jnp.mean(patches, axis=1)  # [B, C]
        if self.pool == "mean":
            return mean
        if self.pool == "token_mean":
            return jnp.concatenate([x[:, 0], mean], axis=-1)  # [B, 2 C]
        return (jnp.max(patches, axis=1) + mean) / 2

    @nn.nowrap
    def _head(self, name: str, x: Float[Array, "*batch c"]) -> Float[Array, "*batch classes"]:
        if not self.classes:
            return x
        return Dense(self.classes, ("embed", "classes"), kernel_init=zeros, name=name)(x)


def _class_first(
    x: Float[Array, "b n c"], bag: Tokens | None, middle: int
) -> tuple[Float[Array, "b n c"], Tokens | None]:
    """The class token before the patches, wherever among them it is by now."""
    if bag is None or bag.whole:
        return jnp.concatenate([x[:, middle : middle + 1], x[:, :middle], x[:, middle + 1 :]], axis=1), bag
    others = jnp.arange(x.shape[1] - 1)[None]  # [1, M - 1]
    place = bag.origin[:, middle : middle + 1]  # [B, 1]
    order = jnp.concatenate([place, others + (others >= place)], axis=1)  # [B, M]
    return rows(x, order), dataclasses.replace(bag, size=rows(bag.size, order))

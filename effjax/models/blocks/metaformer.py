"""The residual block of transformers, with any mixer: MetaFormer, Yu et al. 2022, section 3.1.

    pre_norm        x <- x + drop(s_1 * mixer(norm(x)))
                    x <- x + drop(s_2 * ffn(norm(x)))                    Dosovitskiy et al. 2021, eqs. 2 and 3
    res_post_norm   x <- x + drop(s_1 * norm(mixer(x)))
                    x <- x + drop(s_2 * norm(ffn(x)))                    Liu et al. 2022, Swin V2, figure 1
    parallel        x <- x + drop(s * (mixer(h) + ffn(h))), h = norm(x)  Dehghani et al. 2023, ViT-22B
    one_branch      x <- x + drop(s * ffn(norm(mixer(x))))               Liu et al. 2022, ConvNeXt, figure 4
    unrolled        x <- x + drop(s_1 * mixer(norm(x)))
                    x <- ffn(norm(x))                                    Yu et al. 2023, CRATE, equation 17

`drop` is stochastic depth and `s` an optional learned scale a channel (LayerScale, Touvron et al. 2021). A
norm of the residual stream itself, behind every so many blocks, bounds huge networks (Swin V2, section 3.2).
A `pre_norm` block without an FFN is its first line alone, as state-space models have it; a pruned layer may
be either line, or neither.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax import ffn, mixers
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers import norms
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense, named
from effjax.layers.drop import drop_path
from effjax.mixers.context import Context
from effjax.tokens.point import Passage, Point
from effjax.tokens.tokens import Tokens


class Block(nn.Module):
    """One mixer and one FFN, each with a norm and a residual connection, on tokens or on a grid.

    Attributes:
      mixer: how tokens mix; None leaves that branch out.
      ffn: how channels mix; None leaves that branch out.
      epsilon: of the norms.
      dropout: rate of ordinary dropout on both branches.
      layer_scale: initial value of the channel scales; None leaves them out.
      branch_scale: a factor of the branches that is not learned: 1/2 or 1/3 in LV-ViT, Jiang et al. 2021.
      norm: which norm, a kind in `effjax.layers.norms`.
      norm_scale: what the norms' scales start at; res_post_norm from 0 starts as the identity.
      order: where norms and residual connections stand, see above; `parallel` and `one_branch` have one norm
        and one scale.
      stream_norm: whether a norm of the residual stream itself closes the block.
      width: channels behind the block, which a linear map gives, where layers of two networks follow one
        another; None leaves the stream as it is.
    """

    mixer: Any = part(mixers.KINDS)
    ffn: nn.Module | None = part(ffn.KINDS)
    epsilon: float = 1e-6
    dropout: float = 0.0
    layer_scale: float | None = None
    branch_scale: float = 1.0
    norm: norms.NormKind = "layer"
    norm_scale: float = 1.0
    order: Literal["pre_norm", "res_post_norm", "parallel", "one_branch", "unrolled"] = "pre_norm"
    stream_norm: bool = False
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, an in (("mixer", "a mixer"), ("ffn", "an ffn")):
            if getattr(self, name) is None and self.order != "pre_norm":
                raise UsageError(f"a block without {an} has the order 'pre_norm', not {self.order!r}.")

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *places c"] | Tokens,
        drop_rate: Float[Array, ""],
        context: Context,
        train: bool = False,
        point: Point | None = None,
    ) -> tuple[Float[Array, "b *places width"] | Tokens, Int[Array, "b n0"] | None]:
        """Returns `(x, None)`; at a point, which token each original one is in instead of None.

        Args:
          x: tokens, a map, or a bag of tokens, whose sizes and validity the mixer then sees.
          drop_rate: this layer's stochastic depth.
          context: what the mixer may know besides.
          train: whether this is training.
          point: how this block reduces the tokens of the bag.
        """
        stream = Passage(x, context, point)
        if self.mixer is None:
            stream.check_unmixed()
            if self.ffn is not None:
                h = self.ffn(self._norm("ffn_norm", stream.x, train), train=train)  # [B, ..., C]
                stream.x = stream.x + self._branch(h, drop_rate, "ffn_scale", train)
        elif self.ffn is None:
            h = stream.mix(self.mixer, self._norm("mixer_norm", stream.x, train), train)  # [B, ..., C]
            stream.x = stream.x + self._branch(h, drop_rate, "mixer_scale", train)
            stream.reduce()
        elif self.order == "parallel":
            h = self._norm("norm", stream.x, train)  # [B, ..., C]
            h = stream.mix(self.mixer, h, train) + self.ffn(h, train=train)  # [B, ..., C]
            stream.x = stream.x + self._branch(h, drop_rate, "scale", train)
            stream.reduce()
        elif self.order == "one_branch":
            h = self._norm("norm", stream.mix(self.mixer, stream.x, train), train)  # [B, ..., C]
            stream.x = stream.x + self._branch(self.ffn(h, train=train), drop_rate, "scale", train)
            stream.reduce()
        elif self.order == "res_post_norm":
            h = self._norm("mixer_norm", stream.mix(self.mixer, stream.x, train), train)  # [B, ..., C]
            stream.x = stream.x + self._branch(h, drop_rate, "mixer_scale", train)
            stream.reduce()
            h = self._norm("ffn_norm", self.ffn(stream.x, train=train), train)  # [B, ..., C]
            stream.x = stream.x + self._branch(h, drop_rate, "ffn_scale", train)
        else:
            h = stream.mix(self.mixer, self._norm("mixer_norm", stream.x, train), train)  # [B, ..., C]
            stream.x = stream.x + self._branch(h, drop_rate, "mixer_scale", train)
            stream.reduce()
            h = self.ffn(self._norm("ffn_norm", stream.x, train), train=train)  # [B, ..., C]
            unrolled = self.order == "unrolled"
            stream.x = h if unrolled else stream.x + self._branch(h, drop_rate, "ffn_scale", train)
        if self.stream_norm:
            stream.x = norms.norm(self.norm, self.epsilon, "stream_norm", train=train)(stream.x)
        if self.width is not None:
            stream.x = Dense(self.width, ("embed", None), name="stitch")(stream.x)  # [B, ..., width]
        return stream.out(constrain(stream.x)), stream.record()

    @nn.nowrap
    def _norm(self, name: str, x: Float[Array, "b *places c"], train: bool) -> Float[Array, "b *places c"]:
        return norms.norm(self.norm, self.epsilon, name, train=train, initial=self.norm_scale)(x)

    @nn.nowrap
    def _branch(
        self, h: Float[Array, "b *places c"], drop_rate: Float[Array, ""], name: str, train: bool
    ) -> Float[Array, "b *places c"]:
        if self.layer_scale is not None:
            init = named(nn.initializers.constant(self.layer_scale), ("norm",))
            scale = self.param(name, init, (h.shape[-1],), jnp.float32).astype(h.dtype)
            h = h * scale.reshape((1,) * (h.ndim - 1) + scale.shape)
        if self.branch_scale != 1.0:
            h = h * self.branch_scale
        if self.dropout:
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
        if train and self.has_rng("dropout"):
            h = drop_path(h, drop_rate, self.make_rng("dropout"))
        return h

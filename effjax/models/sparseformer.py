"""SparseFormer: few latent tokens that look where they want, and a vision transformer behind them.

    f = norm(pool(relu(conv(images))))                          early map, a quarter of the picture's sides
    z_n = z_0,  box_n = a grid                                  N latent tokens
    focus, r times:   z <- z + stage_i
        z <- z + mix(f at the points of box(z), z)              sampling and adaptive mixing
        z <- z + W norm(encoding(box)),  attention,  ffn
        box <- adjusted(box, W_2 gelu(W_1 norm(z)))
    z <- z W,  sampling and encoding once more,  [class; z]
    cortex:  blocks of a vision transformer;  logits = norm(z_class) W_head

The points of a token are mixed by matrices that the token makes: `gelu(S F M)`, M over channels, S over
points. The cortex has the names and shapes of the last blocks of a ViT, from whose weights a network starts
(`inherited`): what is new, the focusing part, learns to make its class token what the ViT's is (the task
`alignment`), together with the first blocks (`tuned`), while most of the cortex stays as it was.

Source: Gao et al., "Bootstrapping SparseFormers from Vision Foundation Models", CVPR 2024, section 3; details
of the published code, which mixes without biases, and without an activation between M and S.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import ffn, mixers
from effjax.errors import UsageError
from effjax.layers.conv import Conv
from effjax.layers.dense import Dense, named, truncated_normal, xavier, zeros
from effjax.layers.drop import linear_rates
from effjax.layers.norms import norm, standardised
from effjax.layers.point_sampling import adjusted, box_encoding, initial_boxes, points_in, sampled
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.models.blocks.metaformer import Block


class EarlyMap(nn.Module):
    """A strided convolution and a strided pool; every place is standardised over its channels.

    Attributes:
      features: channels.
      stride: of the convolution.
      pool: whether there is a pool, of stride 2.
    """

    features: int
    stride: int = 2
    pool: bool = True

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h4 w4 features"]:
        """Returns the map."""
        x = nn.relu(Conv(self.features, 7, self.stride, name="conv")(images))  # [B, H/2, W/2, F]
        if self.pool:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # [B, H/4, W/4, F]
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return standardised(x.astype(wide), 1, 1e-5).astype(x.dtype)


class Sampling(nn.Module):
    """A token looks at points of its box and takes up what it saw.

    Attributes:
      points: that it looks at.
      hidden: channels between token and the matrices that it makes.
      epsilon: of the norms.
    """

    points: int
    hidden: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], boxes: Float[Array, "b n 4"], maps: Float[Array, "b h w f"]
    ) -> Float[Array, "b n c"]:
        """Returns what is added to the tokens."""
        b, n, width = x.shape
        features, made, narrow = maps.shape[-1], max(self.points, 32), width**-0.5
        grid = self.param("points", named(_grid, (None, None)), (self.points, 2), jnp.float32)
        moves = Dense(
            (self.points, 2), ("embed", None, None), use_bias=False, kernel_init=zeros, name="moves"
        )
        offsets = moves(norm("layer", self.epsilon, "moves_norm", initial=narrow)(x))  # [B, N, P, 2]
        offsets = offsets + grid.astype(offsets.dtype)[None, None]
        seen = sampled(maps, points_in(boxes, offsets))  # [B, N, P, F]

        h = norm("layer", self.epsilon, "mixing_norm", initial=narrow)(x)
        h = Dense(self.hidden, ("embed", "mlp"), kernel_init=_small, name="mixing_hidden")(
            h
        )  # [B, N, hidden]
        across = Dense(
            (features, features), ("mlp", None, None), kernel_init=zeros, bias_init=xavier, name="channels"
        )(h)  # [B, N, F, F]
        along = Dense(
            (made, self.points), ("mlp", None, None), kernel_init=zeros, bias_init=xavier, name="places"
        )(h)  # [B, N, Q, P]
        batch = ((0, 1), (0, 1))
        y = jax.lax.dot_general(seen, across, (((3,), (2,)), batch))  # [B, N, P, F]
        y = nn.gelu(jax.lax.dot_general(along, y, (((3,), (2,)), batch)), approximate=False)  # [B, N, Q, F]
        y = y.reshape(b, n, made * features)
        return Dense(width, ("mlp", "embed"), kernel_init=_small, name="contract")(y)  # [B, N, C]


class Focus(nn.Module):
    """One turn of the focusing transformer; its parameters serve every turn.

    Attributes:
      points: see `Sampling`.
      hidden: see `Sampling`.
      heads: of the attention; None leaves attention, FFN and the adjustment of boxes out.
      epsilon: of the norms.
    """

    points: int
    hidden: int
    heads: int | None = None
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], boxes: Float[Array, "b n 4"], maps: Float[Array, "b h w f"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n 4"]]:
        """Returns tokens and boxes."""
        width = x.shape[-1]
        if width % 4:
            raise UsageError(f"the width {width} of latent tokens must be a multiple of 4, for their boxes.")
        x = x + Sampling(self.points, self.hidden, self.epsilon, name="sampling")(x, boxes, maps)
        place = norm("layer", self.epsilon, "place_norm")(box_encoding(boxes, width).astype(x.dtype))
        x = x + Dense(width, ("embed", "mlp"), kernel_init=_small, name="place")(place)  # [B, N, C]
        if self.heads is None:
            return x, boxes
        attention = mixers.Attention(self.heads, name="mixer")
        x = x + attention(norm("layer", self.epsilon, "mixer_norm")(x), Context())
        x = x + ffn.MLP(name="ffn")(norm("layer", self.epsilon, "ffn_norm")(x))
        h = norm("layer", self.epsilon, "adjust_norm", initial=width**-0.5)(x)
        h = Dense(width, ("embed", "mlp"), kernel_init=_small, name="adjust_hidden")(h)  # [B, N, C]
        h = nn.gelu(h, approximate=False)
        change = Dense(4, ("mlp", None), use_bias=False, kernel_init=zeros, name="adjust")(h)  # [B, N, 4]
        return x, adjusted(boxes, change)


class SparseFormer(nn.Module):
    """An image classifier on few tokens, at a cost that the size of the picture hardly changes.

    Attributes:
      block: of the cortex.
      depth: blocks of the cortex.
      dim: channels of the cortex.
      classes: outputs of the head; 0 returns the class token behind the norm.
      tokens: latent tokens, the class token not among them.
      focus_dim: their channels in the focusing part.
      features: channels of the early map.
      points: that a token looks at.
      hidden: channels between a token and the matrices that it mixes its points by.
      turns: of the focusing part.
      tuned: first blocks of the cortex that stand apart from the others, as `tuned_blocks`, so that a rule of
        the optimiser can freeze `blocks` and leave these.
      early_stride: of the early convolution.
      early_pool: whether a pool follows it.
      drop_path: stochastic depth of the last block of the cortex, growing linearly from 0.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
    """

    block: Block
    depth: int
    dim: int
    classes: int
    tokens: int = 48
    focus_dim: int = 384
    features: int = 64
    points: int = 16
    hidden: int = 128
    turns: int = 4
    tuned: int = 0
    early_stride: int = 2
    early_pool: bool = True
    drop_path: float = 0.0
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tuned < self.depth:
            raise UsageError(f"tuned={self.tuned} must leave some of the {self.depth} blocks of the cortex.")

    @nn.compact
    def __call__(self, images: Float[Array, "b height width channels"], train: bool = False) -> Array:
        """Returns logits, or with `classes=0` the class token.

        Raises:
          UsageError: for a picture smaller than the early convolution, or a width without heads.
        """
        if self.focus_dim % 64 and self.focus_dim > 64:
            raise UsageError(f"focus_dim={self.focus_dim} must be a multiple of 64, the channels of a head.")
        early = EarlyMap(self.features, self.early_stride, self.early_pool, name="early")
        first = self.param("latent_token", named(truncated_normal(1.0), (None, "embed")), (1, self.focus_dim))
        # Few tokens look at far places: in half precision they would miss the pixel.
        b, dtype = images.shape[0], jnp.promote_types(images.dtype, first.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        maps = early(images.astype(wide))  # [B, H/4, W/4, F]
        x = jnp.broadcast_to(first.astype(wide)[None], (b, self.tokens, self.focus_dim))
        start = self.param("boxes", named(_boxes, (None, None)), (self.tokens, 4), jnp.float32)
        boxes = jnp.broadcast_to(start.astype(wide)[None], (b, *start.shape))  # [B, N, 4]
        stages = self.param("stages", named(_normal, (None, "embed")), (self.turns, self.focus_dim))
        focus = Focus(self.points, self.hidden, max(self.focus_dim // 64, 1), name="focus")
        for turn in range(self.turns):
            x, boxes = focus(x + stages[turn].astype(wide)[None, None], boxes, maps)
        x = Dense(self.dim, ("mlp", "embed"), kernel_init=_small, name="widen")(x)  # [B, N, C]
        x, boxes = Focus(self.points, self.hidden, name="last_look")(x, boxes, maps)
        if not self.is_initializing():
            self.sow("tokens", "boxes", boxes)
        x = x.astype(dtype)

        token = self.param("class_token", named(_normal, (None, "embed")), (1, self.dim), jnp.float32)
        token = jnp.broadcast_to(token.astype(dtype)[None], (b, 1, self.dim))
        x = jnp.concatenate([token, x], axis=1)  # [B, 1 + N, C]
        rates = linear_rates(self.drop_path, self.depth)
        for name, each in (("tuned_blocks", rates[: self.tuned]), ("blocks", rates[self.tuned :])):
            if each.size:
                stack = Stack(self.block, each.size, remat=self.remat, unroll=self.unroll, name=name)
                x, _ = stack(x, Context(), each=each, train=train)  # [B, 1 + N, C]
        x = norm(self.block.norm, self.block.epsilon, "norm")(x[:, 0])  # [B, C]
        if not self.classes:
            return x
        return Dense(self.classes, ("embed", "classes"), kernel_init=zeros, name="head")(x)


def inherited(shapes: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What a SparseFormer takes from a ViT: the last blocks, the class token, the norm and the head.

    Args:
      shapes: parameters of the SparseFormer, or their shapes.
      teacher: parameters of the ViT, of the same width. Where it has no class token, none is taken.

    Raises:
      UsageError: where the ViT is shallower or of other shapes.
    """
    tuned, kept = (_depth(shapes[name]) if name in shapes else 0 for name in ("tuned_blocks", "blocks"))
    whole = _depth(teacher["blocks"])
    if whole < tuned + kept:
        raise UsageError(f"the cortex wants {tuned + kept} blocks and the ViT has {whole}.")
    first = whole - kept
    taken = {"blocks": jax.tree.map(lambda leaf: leaf[first:], teacher["blocks"])}
    if tuned:
        taken["tuned_blocks"] = jax.tree.map(lambda leaf: leaf[first - tuned : first], teacher["blocks"])
    others = ("class_token", "norm", "head")
    taken |= {name: teacher[name] for name in others if name in teacher and name in shapes}
    for name, tree in taken.items():
        given, wanted = (jax.tree.map(lambda leaf: leaf.shape, held) for held in (tree, shapes[name]))
        if given != wanted:
            raise UsageError(f"{name} of the ViT does not fit: {given} where {wanted} is wanted.")
    return taken


def _depth(blocks: Any) -> int:
    return len(jax.tree.leaves(blocks)[0])


_small, _normal = truncated_normal(0.02), nn.initializers.normal(1.0)


def _boxes(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return initial_boxes(shape[0]).astype(dtype)


def _grid(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Points on a square grid about 0, row by row; where their number is no square, anywhere."""
    root = math.isqrt(shape[0])
    if root**2 != shape[0]:
        return jax.random.uniform(key, shape, dtype, -0.5, 0.5)
    place = (jnp.arange(root) + 0.5) / root - 0.5
    y, x = (axis.reshape(-1) for axis in jnp.meshgrid(place, place, indexing="ij"))
    return jnp.stack([x, y], axis=-1).astype(dtype)

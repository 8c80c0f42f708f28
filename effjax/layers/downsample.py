"""From a map to a coarser one: stems, and what stands between the stages of a pyramid.

Each kind is a Linen module that maps `(x [B, H, W, C], dim)` to `[B, H', W', dim]`.
"""

from typing import Literal

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.layers.conv import ConvNorm
from effjax.layers.dense import Dense
from effjax.layers.norms import NormKind, norm
from effjax.layers.patches import PatchEmbed, position_table


class Patches(nn.Module):
    """Patches that do not overlap, each projected: x W + b, and a norm.

    Attributes:
      patch: side of a patch.
      norm: a kind in `effjax.layers.norms`; None leaves it out.
      norm_first: whether it stands before the projection, on single places, as between ConvNeXt's stages.
      epsilon: of the norm.
      edge: what happens where patches do not tile the map: zeros are added below and to the right, what is
        over is cut off, or the map is refused.
      positions: whether a learned table is added at the end, made for one size of map.
    """

    patch: int
    norm: NormKind | None = "layer"
    norm_first: bool = False
    epsilon: float = 1e-6
    edge: Literal["pad", "crop", "refuse"] = "refuse"
    positions: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], dim: int, train: bool = False
    ) -> Float[Array, "b h2 w2 dim"]:
        """Cuts and projects."""
        if self.norm is not None and self.norm_first:
            x = norm(self.norm, self.epsilon, "norm", train=train)(x)
        if self.edge == "pad":
            x = pad_to(x, self.patch)
        x = PatchEmbed(self.patch, dim, crop=self.edge == "crop", name="embed")(x)  # [B, H/p, W/p, dim]
        if self.norm is not None and not self.norm_first:
            x = norm(self.norm, self.epsilon, "norm", train=train)(x)
        if self.positions:
            table = position_table(self, x.shape[1] * x.shape[2], dim)  # [H/p W/p, dim]
            x = x + table.astype(x.dtype).reshape(1, *x.shape[1:])
        return x


class Merge(nn.Module):
    """Patch merging: 2 x 2 neighbours side by side, a norm and a projection without bias.

    Source: Swin Transformer, Liu et al. 2021, section 3.1; with the norm behind the projection, Swin V2,
    Liu et al. 2022. A map of odd sides gets zeros below and to the right.

    Attributes:
      norm: a kind in `effjax.layers.norms`.
      norm_first: whether it stands before the projection.
      epsilon: of the norm.
      use_bias: bias of the projection.
    """

    norm: NormKind = "layer"
    norm_first: bool = True
    epsilon: float = 1e-5
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], dim: int, train: bool = False
    ) -> Float[Array, "b h2 w2 dim"]:
        """Halves both sides."""
        x = pad_to(x, 2)
        # The neighbours' order is that of the published weights: down before right.
        x = einops.rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)  # [B, H/2, W/2, 4 C]
        if self.norm_first:
            x = norm(self.norm, self.epsilon, "norm", train=train)(x)
        x = Dense(dim, (None, "embed"), use_bias=self.use_bias, name="reduction")(x)  # [B, H/2, W/2, dim]
        return x if self.norm_first else norm(self.norm, self.epsilon, "norm", train=train)(x)


class Convs(nn.Module):
    """Overlapping convolutions one after another, each with its norm and activation.

    Attributes:
      layers: the convolutions; one that says no features has those of the stage.
      norm: before all of them; None leaves it out.
      epsilon: of that norm.
    """

    layers: tuple[ConvNorm, ...]
    norm: NormKind | None = None
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], dim: int, train: bool = False
    ) -> Float[Array, "b h2 w2 dim"]:
        """Convolves."""
        if self.norm is not None:
            x = norm(self.norm, self.epsilon, "norm", train=train)(x)
        for layer in self.layers:
            x = layer(x, train=train, features=None if layer.depthwise else dim)
        return x


def pad_to(x: Float[Array, "b h w c"], multiple: int) -> Float[Array, "b h2 w2 c"]:
    """Adds zeros below and to the right up to the next multiple of both sides."""
    below, right = (-side % multiple for side in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


KINDS = {"patches": Patches, "merge": Merge, "convs": Convs}

"""Images to patch tokens and back, and the fixed sine-cosine position table.

tokens[b, i, j] = flatten(image[b, i p : (i + 1) p, j p : (j + 1) p]) W + b    Dosovitskiy et al. 2021, eq. 1
"""

import einops
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, truncated_normal, xavier
from effjax.layers.norms import NormKind, norm


def check_divides(height: int, width: int, patch: int) -> None:
    """Refuses a picture that patches do not tile."""
    if height % patch or width % patch or not (height and width):
        raise UsageError(
            f"a picture of {height} x {width} cannot be cut into patches of {patch} x {patch}: "
            f"resize it to a multiple of {patch}, or choose a patch that divides both sides."
        )


class PatchEmbed(nn.Module):
    """Cuts a picture into patches and projects each, the same map as a convolution.

    Attributes:
      patch: side of a patch.
      dim: channels of a token.
      kernel_init: initialiser of the projection.
      use_bias: its bias.
      crop: leaves out the pixels below and right of the last whole patch, as a convolution does.
      stride: pixels from one patch to the next; None means `patch`, and fewer let patches overlap.
      norm: on the pixels of each patch, a kind in `effjax.layers.norms`; None leaves it out.
      epsilon: of the norm.
    """

    patch: int
    dim: int
    kernel_init: Initializer = xavier
    use_bias: bool = True
    crop: bool = False
    stride: int | None = None
    norm: NormKind | None = None
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, images: Float[Array, "b height width c"]) -> Float[Array, "b h w dim"]:
        """Returns the grid of tokens."""
        stride = self.patch if self.stride is None else self.stride
        if self.crop and min(images.shape[1:3]) >= self.patch:
            h, w = (side - (side - self.patch) % stride for side in images.shape[1:3])
            images = images[:, :h, :w]
        if stride == self.patch:
            check_divides(images.shape[1], images.shape[2], self.patch)
            cut = "b (h p) (w q) c -> b h w (p q c)"
            x = einops.rearrange(images, cut, p=self.patch, q=self.patch)  # [B, H/p, W/p, p p C]
        else:
            x = overlapping(images, self.patch, stride)  # [B, h, w, p p C]
        if self.norm is not None:
            x = norm(self.norm, self.epsilon, "norm")(x)
        axes, init = (None, "embed"), self.kernel_init
        return Dense(self.dim, axes, use_bias=self.use_bias, kernel_init=init, name="projection")(x)


def overlapping(
    images: Float[Array, "b height width c"], patch: int, stride: int
) -> Float[Array, "b h w pixels"]:
    """Patches `stride` pixels apart, each as its `p p C` values.

    Raises:
      UsageError: where the last patches end before the picture does, or beyond it.
    """
    if any(side < patch or (side - patch) % stride for side in images.shape[1:3]):
        raise UsageError(
            f"patches of {patch} x {patch} pixels, {stride} apart, do not end with a picture of "
            f"{images.shape[1]} x {images.shape[2]}: resize it to {patch} and a multiple of {stride}."
        )
    rows, columns = (
        np.arange(0, side - patch + 1, stride)[:, None] + np.arange(patch)[None] for side in images.shape[1:3]
    )
    x = images[:, rows][:, :, :, columns]  # [B, h, p, w, p, C]
    return einops.rearrange(x, "b h p w q c -> b h w (p q c)")


def unpatch(
    tokens: Float[Array, "b n pixels"], grid: tuple[int, int], patch: int
) -> Float[Array, "b height width c"]:
    """Lays `p p C` values a token out as a picture: the inverse of the cut in `PatchEmbed`."""
    h, w = grid
    return einops.rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=h, w=w, p=patch, q=patch)


def sincos_table(
    grid: tuple[int, int], dim: int, base: float = 10_000.0, span: int | None = None
) -> Float[np.ndarray, "n dim"]:
    """Fixed 2-D positions: half of the channels for the column, half for the row, each half sines then
    cosines.

    The frequencies are `base ** (-k / (dim / 4))` for `k = 0 .. dim / 4 - 1`; rows of the table run over
    the grid row by row. This is the table of MAE and of DiT.

    Args:
      grid: rows and columns.
      dim: channels.
      base: of the frequencies.
      span: positions run from 0 to below it on a grid of any size; None counts patches. diffusers stretches
        the grid of another picture size over the positions that training has seen.

    Raises:
      UsageError: where `dim` is no multiple of four.
    """
    if dim % 4:
        raise UsageError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}.")
    frequencies = base ** (-np.arange(dim // 4, dtype=np.float64) / (dim // 4))

    def encode(position: np.ndarray) -> np.ndarray:
        angle = position.reshape(-1, 1) * frequencies[None, :]  # [N, dim / 4]
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    row, column = (np.arange(n) * (1.0 if span is None else span / n) for n in grid)
    rows, columns = np.meshgrid(row, column, indexing="ij")
    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def sincos_line(count: int, dim: int, base: float = 10_000.0) -> Float[np.ndarray, "count dim"]:
    """Fixed positions along one axis: sines, then cosines, of `base ** (-k / (dim / 2))` times the place.

    Raises:
      UsageError: for an odd `dim`.
    """
    if dim % 2:
        raise UsageError(f"sine-cosine positions need an even width, not {dim}.")
    frequencies = base ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2))
    angle = np.arange(count).reshape(-1, 1) * frequencies[None, :]  # [count, dim / 2]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def position_table(module: nn.Module, places: int, dim: int) -> Float[Array, "places dim"]:
    """A learned table of positions, the parameter `positions` of a module.

    Raises:
      UsageError: where the module has one for another number of places.
    """
    if module.has_variable("params", "positions"):
        held: int = module.get_variable("params", "positions").shape[0]
        if held != places:
            raise UsageError(
                f"the position table holds {held} tokens and this picture makes {places}: resize the "
                f"picture, or interpolate the table when loading the weights."
            )
    init = named(truncated_normal(0.02), ("length_table", "embed"))
    return jnp.asarray(module.param("positions", init, (places, dim), jnp.float32))


def add_positions(x: Float[Array, "b n c"], table: Float[Array, "n c"]) -> Float[Array, "b n c"]:
    """Adds a position table to every sequence of the batch, in the dtype of the sequence."""
    return x + jnp.asarray(table, x.dtype)[None]

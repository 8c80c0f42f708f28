"""Points of a map by bilinear interpolation, inside boxes that move.

    box = (x_1, y_1, x_2, y_2), of the picture's width and height; beyond 0 and 1 lies what its border repeats
    adjusted     centre + d_xy size,   size exp(d_wh)
    points       centre + size (o - mean o) / (3 std o)      over the points of a box
    value at p   of the four pixels around p W - 1/2, by their nearness

Gao et al., "SparseFormer: Sparse Visual Recognition via Limited Latent Tokens", ICLR 2024, section 3.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def adjusted(boxes: Float[Array, "b n 4"], change: Float[Array, "b n 4"]) -> Float[Array, "b n 4"]:
    """Moves boxes by a share of their size, and stretches them."""
    low, high = boxes[..., :2], boxes[..., 2:]
    centre, size = (low + high) / 2, jnp.abs(high - low)
    centre = centre + change[..., :2] * size
    size = size * jnp.exp(change[..., 2:])
    return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def points_in(
    boxes: Float[Array, "b n 4"], offsets: Float[Array, "b n p 2"], epsilon: float = 1e-5
) -> Float[Array, "b n p 2"]:
    """Where offsets lie in their box: their spread over the points of a box is a third of it on each side."""
    low, high = boxes[:, :, None, :2], boxes[:, :, None, 2:]  # [B, N, 1, 2]
    mean = jnp.mean(offsets, axis=2, keepdims=True)
    spread = jnp.std(offsets, axis=2, keepdims=True, ddof=1) + epsilon
    return (low + high) / 2 + (high - low) * (offsets - mean) / (3 * spread)


def sampled(maps: Float[Array, "b h w c"], points: Float[Array, "b n p 2"]) -> Float[Array, "b n p c"]:
    """The maps at points `(x, y)` in units of their width and height; pixels are centred on halves.

    Computed in the dtype of the maps, places in float32 or wider.
    """
    b, height, width, c = maps.shape
    scale = jnp.array([[[[width, height]]]], points.dtype)
    most = scale - 1
    at = jnp.clip(points * scale - 0.5, 0, most)  # [B, N, P, 2]
    low = jnp.minimum(jnp.floor(at), jnp.maximum(most - 1, 0))
    share = (at - low).astype(maps.dtype)  # of the pixel behind
    x, y = low[..., 0].astype(jnp.int32), low[..., 1].astype(jnp.int32)  # [B, N, P]
    flat = maps.reshape(b, height * width, c)

    def pixel(right: int, below: int) -> Float[Array, "b n p c"]:
        column, row = jnp.minimum(x + right, width - 1), jnp.minimum(y + below, height - 1)
        index = (row * width + column).reshape(b, -1)
        values = jax.vmap(lambda rows, at: rows.at[at].get(mode="clip"))(flat, index)
        near = jnp.where(right, share[..., 0], 1 - share[..., 0])
        near = near * jnp.where(below, share[..., 1], 1 - share[..., 1])  # [B, N, P]
        return values.reshape(*x.shape, c) * near[..., None]

    return pixel(0, 0) + pixel(1, 0) + pixel(0, 1) + pixel(1, 1)


def box_encoding(
    boxes: Float[Array, "b n 4"], channels: int, highest: float = 128.0
) -> Float[Array, "b n channels"]:
    """Sines of every other, then cosines of the other frequencies between pi and `highest` pi, for each side.

    No gradient goes to the boxes.
    """
    frequencies = jnp.exp(jnp.linspace(0.0, math.log(highest), channels // 4))  # [C/4]
    angles = jax.lax.stop_gradient(boxes)[..., None] * (math.pi * frequencies)[None, None, None]
    waves = jnp.concatenate([jnp.sin(angles[..., 0::2]), jnp.cos(angles[..., 1::2])], axis=-1)
    return waves.reshape(*boxes.shape[:2], -1)


def initial_boxes(count: int, side: float = 0.5) -> Float[Array, "count 4"]:
    """As many as fill a square grid, each `side` of the picture wide; the others are the whole picture."""
    root = math.isqrt(count)
    corner = jnp.arange(root) / max(root - 1, 1) * (1 - side)  # [root]
    x, y = (axis.reshape(-1) for axis in jnp.meshgrid(corner, corner, indexing="ij"))
    grid = jnp.stack([x, y, x + side, y + side], axis=-1)  # [root^2, 4]
    rest = jnp.broadcast_to(jnp.array([[0.0, 0.0, 1.0, 1.0]]), (count - root**2, 4))
    return jnp.concatenate([grid, rest])

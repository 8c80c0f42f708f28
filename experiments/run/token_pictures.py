"""Which tokens went where, drawn on the pictures that they were made of."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from experiments.run.plots import new_figure, png

_DROPPED = (104, 32, 32)  # what no token holds


def visible(images: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Standardised pictures as bytes: each stretched to its own range, grey ones in three equal channels."""
    low = images.min(axis=(1, 2, 3), keepdims=True)
    high = images.max(axis=(1, 2, 3), keepdims=True)
    scaled = (255 * (images - low) / np.maximum(high - low, 1e-6)).astype(np.uint8)
    return np.repeat(scaled, 3, axis=-1) if images.shape[-1] == 1 else scaled


def draw_groups(
    image: UInt8[np.ndarray, "h w 3"], groups: Int[np.ndarray, "rows columns"], least_pixels: int = 128
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture as the last layer sees it: one colour a token, a line between tokens, dark where none is.

    Args:
      image: the picture.
      groups: of each patch the token that holds it, -1 for none.
      least_pixels: smaller pictures are enlarged to at least this height, by a whole factor.
    """
    factor = max(1, -(-least_pixels // image.shape[0]))
    large = image.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = large.shape[:2]
    rows = np.arange(height) * groups.shape[0] // height
    columns = np.arange(width) * groups.shape[1] // width
    held = groups[rows][:, columns]  # [H, W]
    drawn = np.broadcast_to(np.array(_DROPPED, np.uint8), large.shape).copy()
    for token in np.unique(held[held >= 0]):
        inside = held == token
        drawn[inside] = large[inside].mean(axis=0).astype(np.uint8)
    edge = np.zeros((height, width), bool)
    edge[1:] |= held[1:] != held[:-1]
    edge[:, 1:] |= held[:, 1:] != held[:, :-1]
    drawn[edge] = 255
    return drawn


def sheet(
    images: UInt8[np.ndarray, "n h w 3"], groups: Mapping[str, Sequence[Int[np.ndarray, "rows columns"]]]
) -> bytes:
    """A PNG: a row a picture, the picture first and then what each method leaves of it."""
    titles = ("picture", *groups)
    figure, axes = new_figure(1.6 * len(titles), 1.6 * len(images))
    axes.remove()
    grid = figure.subplots(len(images), len(titles), squeeze=False)
    for row, image in enumerate(images):
        cells = (image, *(draw_groups(image, of[row]) for of in groups.values()))
        for column, (title, cell) in enumerate(zip(titles, cells, strict=True)):
            grid[row, column].imshow(cell, interpolation="nearest")
            grid[row, column].set_axis_off()
            if row == 0:
                grid[row, column].set_title(title.replace(":", "\n", 1), fontsize=7)
    return png(figure)

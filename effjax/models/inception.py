"""Inception-v3: the network in whose features pictures are compared.

    cell(x) = concat(branch_1(x), ..., branch_n(x), pool(x)),   every convolution relu(norm(conv(x)))

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 6 and its
figures 5 to 7. The distances that papers report (FID, Heusel et al. 2017) are between the 2,048 pooled
features of one set of weights for it, ported from TensorFlow. That graph differs in three pools, which `fid`
switches on: averages count only the places within the map, the last cell takes maxima where all others take
averages, and there are 1,008 outputs.

Parts are named as in the published checkpoints, which tell cells and convolutions apart by name alone.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named
from effjax.layers.norms import norm

Pool = Literal["average", "average_inside", "max"]

_fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


@dataclasses.dataclass(frozen=True)
class Step:
    """One convolution of a branch.

    Attributes:
      name: behind the name of its branch.
      features: output channels.
      kernel: height and width.
      stride: of the output places; 2 keeps to the places within the map, 1 keeps the size.
    """

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# Steps one behind another; a tuple of steps in the last place runs side by side.
Branch = tuple[Step | tuple[Step, ...], ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """The branches of one cell, and its pool.

    Attributes:
      branches: in the order of their channels.
      pool: what the last branch begins with.
      features: of the convolution behind the pool; None where the pool halves the map and there is none.
    """

    branches: tuple[Branch, ...]
    pool: Pool
    features: int | None = None


def _row(name: str, features: int, side: int) -> Step:
    return Step(name, features, (1, side))


def _column(name: str, features: int, side: int) -> Step:
    return Step(name, features, (side, 1))


def _a(features: int, pool: Pool) -> Cell:
    """Squares of 5 x 5, and of 3 x 3 twice: figure 5."""
    return Cell(
        (
            (Step("branch1x1", 64),),
            (Step("branch5x5_1", 48), Step("branch5x5_2", 64, (5, 5))),
            (
                Step("branch3x3dbl_1", 64),
                Step("branch3x3dbl_2", 96, (3, 3)),
                Step("branch3x3dbl_3", 96, (3, 3)),
            ),
        ),
        pool,
        features,
    )


def _b() -> Cell:
    """To half of the size."""
    return Cell(
        (
            (Step("branch3x3", 384, (3, 3), 2),),
            (
                Step("branch3x3dbl_1", 64),
                Step("branch3x3dbl_2", 96, (3, 3)),
                Step("branch3x3dbl_3", 96, (3, 3), 2),
            ),
        ),
        "max",
    )


def _c(width: int, pool: Pool) -> Cell:
    """Rows and columns of 7: figure 6."""
    return Cell(
        (
            (Step("branch1x1", 192),),
            (Step("branch7x7_1", width), _row("branch7x7_2", width, 7), _column("branch7x7_3", 192, 7)),
            (
                Step("branch7x7dbl_1", width),
                _column("branch7x7dbl_2", width, 7),
                _row("branch7x7dbl_3", width, 7),
                _column("branch7x7dbl_4", width, 7),
                _row("branch7x7dbl_5", 192, 7),
            ),
        ),
        pool,
        192,
    )


def _d() -> Cell:
    """To half of the size again."""
    return Cell(
        (
            (Step("branch3x3_1", 192), Step("branch3x3_2", 320, (3, 3), 2)),
            (
                Step("branch7x7x3_1", 192),
                _row("branch7x7x3_2", 192, 7),
                _column("branch7x7x3_3", 192, 7),
                Step("branch7x7x3_4", 192, (3, 3), 2),
            ),
        ),
        "max",
    )


def _e(pool: Pool) -> Cell:
    """Rows and columns of 3 side by side: figure 7."""
    return Cell(
        (
            (Step("branch1x1", 320),),
            (
                Step("branch3x3_1", 384),
                (_row("branch3x3_2a", 384, 3), _column("branch3x3_2b", 384, 3)),
            ),
            (
                Step("branch3x3dbl_1", 448),
                Step("branch3x3dbl_2", 384, (3, 3)),
                (_row("branch3x3dbl_3a", 384, 3), _column("branch3x3dbl_3b", 384, 3)),
            ),
        ),
        pool,
        192,
    )


def cells(fid: bool) -> dict[str, Cell]:
    """The cells by name, from the first to the last."""
    pool: Pool = "average_inside" if fid else "average"
    return {
        "Mixed_5b": _a(32, pool),
        "Mixed_5c": _a(64, pool),
        "Mixed_5d": _a(64, pool),
        "Mixed_6a": _b(),
        "Mixed_6b": _c(128, pool),
        "Mixed_6c": _c(160, pool),
        "Mixed_6d": _c(160, pool),
        "Mixed_6e": _c(192, pool),
        "Mixed_7a": _d(),
        "Mixed_7b": _e(pool),
        "Mixed_7c": _e("max" if fid else pool),
    }


# In front of the cells: name, channels, side of the kernel, stride, zeros on each side.
STEM = (
    ("Conv2d_1a_3x3", 32, 3, 2, 0),
    ("Conv2d_2a_3x3", 32, 3, 1, 0),
    ("Conv2d_2b_3x3", 64, 3, 1, 1),
    None,  # a maximum over 3 x 3 places, every second of them
    ("Conv2d_3b_1x1", 80, 1, 1, 0),
    ("Conv2d_4a_3x3", 192, 3, 1, 0),
    None,
)
_SMALLEST = 75


class Inception(nn.Module):
    """Inception-v3 without its auxiliary head.

    Attributes:
      classes: outputs of the head; 0 returns the 2,048 pooled features.
      fid: whether pools are those of the weights that FID is measured with.
      width: share of the published channels, for toys.
    """

    classes: int = 1000
    fid: bool = False
    width: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b classes"]:
        """Returns logits, or features.

        Args:
          x: pictures, in [-1, 1] for the published weights, which saw 299 x 299 pixels.
          train: whether batch norms take the statistics of the batch.

        Raises:
          UsageError: for pictures of less than 75 pixels a side.
        """
        if min(x.shape[1:3]) < _SMALLEST:
            raise UsageError(
                f"Inception-v3 halves its maps five times: pictures of {x.shape[1]} x {x.shape[2]} are too "
                f"small, take at least {_SMALLEST} x {_SMALLEST}, or resize them."
            )
        for layer in STEM:
            if layer is None:
                x = nn.max_pool(x, (3, 3), (2, 2))
            else:
                name, features, side, stride, edge = layer
                x = self._conv(x, name, features, (side, side), stride, (edge, edge), train)
        for name, cell in cells(self.fid).items():
            x = self._cell(x, name, cell, train)  # [B, H, W, C]
        pooled = jnp.mean(x, axis=(1, 2))  # [B, 2048]
        if not self.classes:
            return pooled
        return Dense(self.classes, ("embed", "classes"), name="fc")(pooled)

    @nn.nowrap
    def _cell(self, x: Float[Array, "b h w c"], cell_name: str, cell: Cell, train: bool) -> Array:
        """All branches on the same maps, their channels side by side."""

        def convolve(x: Array, step: Step) -> Array:
            edges = (0, 0) if step.stride > 1 else (step.kernel[0] // 2, step.kernel[1] // 2)
            name = f"{cell_name}_{step.name}"
            return self._conv(x, name, step.features, step.kernel, step.stride, edges, train)

        made = []
        for branch in cell.branches:
            y = x
            for step in branch:
                if isinstance(step, Step):
                    y = convolve(y, step)
                else:
                    y = jnp.concatenate([convolve(y, one) for one in step], axis=-1)
            made.append(y)
        if cell.features is None:
            made.append(nn.max_pool(x, (3, 3), (2, 2)))
        else:
            made.append(convolve(pooled(x, cell.pool), Step("branch_pool", cell.features)))
        return jnp.concatenate(made, axis=-1)

    @nn.nowrap
    def _conv(
        self,
        x: Float[Array, "b h w c"],
        name: str,
        features: int,
        kernel: tuple[int, int],
        stride: int,
        edges: tuple[int, int],
        train: bool,
    ) -> Float[Array, "b h2 w2 o"]:
        """relu(norm(conv(x)))."""
        padding = [(edge, edge) for edge in edges]
        options: dict[str, Any] = dict(kernel_init=named(_fan_in, (None, None, None, "embed")))
        width = max(1, round(features * self.width))
        y = nn.Conv(width, kernel, (stride, stride), padding, use_bias=False, name=f"{name}_conv", **options)(
            x
        )
        return jax.nn.relu(norm("batch", 1e-3, f"{name}_norm", train=train)(y))


def pooled(x: Float[Array, "b h w c"], kind: Pool) -> Float[Array, "b h w c"]:
    """Over 3 x 3 places around every place; zeros beyond the edges count for `average` alone."""
    same = ((1, 1), (1, 1))
    if kind == "max":
        return nn.max_pool(x, (3, 3), (1, 1), same)
    return nn.avg_pool(x, (3, 3), (1, 1), same, count_include_pad=kind == "average")

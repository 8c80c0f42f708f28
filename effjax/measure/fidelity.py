"""How far drawn pictures are from real ones, in the features of some network.

    Fréchet distance    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)
    precision           share of the drawn features that lie in the manifold of the real ones
    recall              share of the real features that lie in the manifold of the drawn ones

`m` and `C` are mean and covariance of the features. The manifold of a set is the union of balls around its
members, each as wide as the distance to the member's k-th nearest neighbour. With features of an Inception
network the first is the FID; only figures of equal extractors and equal numbers of pictures can be compared.
All is computed in float32, of which a Fréchet distance loses what the traces exceed it by.

Sources: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, eq. 6; Kynkäänniemi et al.,
"Improved Precision and Recall Metric for Assessing Generative Models", 2019, eqs. 1 and 2.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError

# Rows of the matrix of distances that stand in memory at once.
_ROWS = 512


@flax.struct.dataclass
class Moments:
    """Count, mean and spread of features, which add up over batches.

    Attributes:
      count: how many.
      mean: `[C]`.
      root: `[C, C]`, triangular, where `root^T root` is the sum of outer products of the features without
        their mean. Float32 holds a root to twice as many digits as the sum.
    """

    count: Any
    mean: Any
    root: Any

    @classmethod
    def of(cls, features: Float[Array, "n c"], mask: Float[Array, " n"] | None = None) -> "Moments":
        """Those of one batch; rows where `mask` is 0 do not count."""
        features = features.astype(jnp.float32)
        weight = jnp.ones(len(features)) if mask is None else (mask > 0).astype(jnp.float32)
        count = jnp.sum(weight)
        mean = weight @ features / jnp.maximum(count, 1)  # [C]
        return cls(count, mean, _triangular((features - mean[None]) * weight[:, None]))

    def merged(self, other: "Moments") -> "Moments":
        """Those of both together."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)
        step = other.mean - self.mean  # [C]
        between = jnp.sqrt(self.count * share) * step[None]  # [1, C]
        root = _triangular(jnp.concatenate([self.root, other.root, between]))
        return Moments(count, self.mean + share * step, root)

    def covariance(self) -> Float[Array, "c c"]:
        """Unbiased."""
        covariance: Array = _product(self.root.T, self.root) / (self.count - 1)
        return covariance


def frechet_distance(one: Moments, other: Moments) -> Float[Array, ""]:
    """The distance between two normal distributions with these moments.

    With C = R^T R the last term is twice the sum of the singular values of R_1 R_2^T: no root of a covariance
    is taken, whose small eigenvalues float32 does not know.

    Raises:
      UsageError: for features of another width.
    """
    if one.mean.shape != other.mean.shape:
        raise UsageError(
            f"features of {one.mean.shape[0]} and of {other.mean.shape[0]} channels have no distance: take "
            f"both from one extractor."
        )
    first = one.root / jnp.sqrt(one.count - 1)  # [C, C]
    second = other.root / jnp.sqrt(other.count - 1)  # [C, C]
    overlap = jnp.sum(jnp.linalg.svd(_product(first, second.T), compute_uv=False))
    apart = jnp.sum((one.mean - other.mean) ** 2)
    return apart + jnp.sum(first**2) + jnp.sum(second**2) - 2 * overlap


def precision_and_recall(
    drawn: Float[Array, "n c"], real: Float[Array, "m c"], neighbours: int = 3
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Precision and recall of drawn features.

    Raises:
      UsageError: where there are not more features than neighbours.
    """
    if not 0 < neighbours < min(len(drawn), len(real)):
        raise UsageError(
            f"neighbours={neighbours} needs more features than that, and there are {len(drawn)} drawn and "
            f"{len(real)} real ones."
        )
    precision = jnp.mean(_inside(drawn, real, _radii(real, neighbours)))
    recall = jnp.mean(_inside(real, drawn, _radii(drawn, neighbours)))
    return precision, recall


@functools.partial(jax.jit, static_argnums=1)
def _radii(features: Float[Array, "n c"], neighbours: int) -> Float[Array, " n"]:
    """Squared distance of each to its k-th nearest neighbour, itself not counted."""

    def row(x: Array) -> Array:
        nearest, _ = jax.lax.top_k(-_squares(x, features), neighbours + 1)
        return -nearest[-1]

    return jax.lax.map(row, features, batch_size=_ROWS)


@jax.jit
def _inside(
    features: Float[Array, "n c"], centres: Float[Array, "m c"], radii: Float[Array, " m"]
) -> Bool[Array, " n"]:
    """Whether each lies in one of the balls."""

    def row(x: Array) -> Array:
        return jnp.any(_squares(x, centres) <= radii)

    return jax.lax.map(row, features, batch_size=_ROWS)


def _squares(x: Float[Array, " c"], others: Float[Array, "m c"]) -> Float[Array, " m"]:
    """Squared distances, by differences: the expanded square would lose small ones in float32."""
    return jnp.sum((others - x[None]) ** 2, axis=-1)


def _triangular(rows: Float[Array, "n c"]) -> Float[Array, "c c"]:
    """R with `R^T R = rows^T rows`."""
    short = jnp.zeros((max(0, rows.shape[1] - rows.shape[0]), rows.shape[1]), rows.dtype)
    triangular: Array = jnp.linalg.qr(jnp.concatenate([rows, short]), mode="r")
    return triangular


_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
